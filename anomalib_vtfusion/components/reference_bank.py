"""Reference bank: patch features of the normal images, and the distance of a query's patches from them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from anomalib_vtfusion.components.variable_buffers import VariableBuffers

# Share of the references' mean feature that is taken off every feature: what all patches have in common tells nothing.
CENTRING = 0.3
# Rows around a row that tell how far apart normal patches of its kind lie, how much that counts, and in which bounds.
NEIGHBOURS = 32
SPACING_POWER = 0.5
SPACING_BOUNDS = (0.25, 4.0)
# Rows whose neighbours are looked for at once.
CHUNK = 2048
# No weighted distance is larger: the largest weight times the largest cosine distance.
FARTHEST = 2 * SPACING_BOUNDS[0] ** -SPACING_POWER
# Share of an image's own mean distance that is taken off its distances: light or focus moves all of them alike, but a
# part that is wrong all over must still show.
MEAN_SHARE = 0.5


def greedy_coreset(rows: Tensor, size: int, generator: torch.Generator, projection_dim: int = 64) -> Tensor:
    """Indices of ``size`` rows that cover all rows (greedy k-centre on a random projection).

    Args:
        rows: ``(R, C)``.
        size: How many rows to keep; all of them when there are no more than that.
        generator: CPU generator of the first row and of the projection.
        projection_dim: Width of the Johnson-Lindenstrauss projection in which distances are compared.

    Returns:
        Sorted indices ``(min(size, R),)``. Source: PatchCore (Roth et al., 2022), algorithm 1.
    """
    count, width = rows.shape
    if count <= size:
        return torch.arange(count, device=rows.device)
    projection = torch.randn(width, min(width, projection_dim), generator=generator).to(rows)
    points = rows @ projection
    chosen = torch.empty(size, dtype=torch.long, device=rows.device)
    chosen[0] = torch.randint(count, (1,), generator=generator).to(rows.device)
    nearest = torch.full((count,), torch.inf, device=rows.device)
    squared = points.square().sum(dim=1)
    for i in range(1, size):
        last = chosen[i - 1]
        distance = squared + squared[last] - 2 * (points @ points[last])
        nearest = torch.minimum(nearest, distance)
        nearest[last] = -torch.inf  # a row is never taken twice, copies of it may be
        chosen[i] = nearest.argmax()
    return chosen.sort().values


def spacing_weights(rows: Tensor) -> Tensor:
    """How much a distance from each row counts: less where normal patches lie far apart.

    The mean distance to a row's nearest `NEIGHBOURS` rows, relative to all rows' mean, to the power `-SPACING_POWER`.
    To judge a distance by those around it is the idea of the local outlier factor (Breunig et al., 2000).

    Args:
        rows: Unit vectors ``(R, C)``.

    Returns:
        Weights ``(R,)`` from 0.5 to 2; ones when all rows lie equally far apart.
    """
    count = min(NEIGHBOURS, len(rows) - 1)
    if count == 0:
        return rows.new_ones(len(rows))
    # The nearest of all is the row itself. A part of the rows at a time: memory must not grow with their square.
    nearest = [(chunk @ rows.t()).topk(count + 1, dim=1).values[:, 1:] for chunk in rows.split(CHUNK)]
    spacing = (1 - torch.cat(nearest).mean(dim=1)).clamp_min(1e-4)
    return (spacing / spacing.mean()).clamp(*SPACING_BOUNDS).pow(-SPACING_POWER)


def nearest_distance(queries: Tensor, rows: Tensor, blocked: Tensor | None = None) -> Tensor:
    """Weighted cosine distance ``w * (1 - cos)`` of each query token from the row where it is least.

    Args:
        queries: Unit vectors ``(B, N, C)``.
        rows: Vectors ``(R, C)`` as long as their weight ``w``, so that one matrix product does the search.
        blocked: Optional mask ``(B, R)``: rows that a query must not be matched against.

    Returns:
        ``(B, N)`` in ``[0, FARTHEST]``, the latter where every row is blocked.
    """
    if not rows.requires_grad:
        return -_similarities(queries, rows, blocked).amax(dim=1)
    # Only the nearest row has a gradient, so the search itself runs without one and keeps no (B, R, N) tensor alive.
    with torch.no_grad():
        nearest = _similarities(queries, rows, blocked).argmax(dim=1)
    chosen = rows[nearest]
    return chosen.norm(dim=-1) - (queries * chosen).sum(dim=-1)


def _similarities(queries: Tensor, rows: Tensor, blocked: Tensor | None) -> Tensor:
    """Weighted distances with the sign turned round ``(B, R, N)``, ``-FARTHEST`` where a row is blocked."""
    lengths = rows.norm(dim=-1)
    if queries.is_cuda:  # convolutions round to TF32 there
        found = (F.linear(queries.flatten(0, 1), rows) - lengths).unflatten(0, queries.shape[:2]).transpose(1, 2)
    else:  # the same product as a 1x1 convolution, twice as fast on a CPU
        found = F.conv2d(queries.transpose(1, 2)[..., None], rows[..., None, None], -lengths)[..., 0]
    return found if blocked is None else found.masked_fill_(blocked[:, :, None], -FARTHEST)


class ReferenceBank(VariableBuffers):
    """Patch features of the reference images, a matrix a layer, bounded in size.

    ``keys`` are what inference matches against, stored ready for one matrix product a layer: adapted rows, each as long
    as a distance from it counts (`spacing_weights`). While the adapter trains, the frozen rows they come from are kept
    beside them (not saved) and adapted anew at each step. Every row knows the reference it comes from, so that a
    reference is never matched against itself.

    Args:
        channels: Width ``C_l`` of each layer.
        max_rows: Most rows kept of a layer.

    Raises:
        ValueError: If ``max_rows`` is not positive.
    """

    def __init__(self, channels: list[int], max_rows: int) -> None:
        super().__init__()
        if max_rows < 1:
            msg = f"The reference bank needs room for at least one row a layer, got max_rows={max_rows}."
            raise ValueError(msg)
        self.variable_buffers = tuple(f"keys_{layer}" for layer in range(len(channels)))
        self.max_rows = max_rows
        for layer, width in enumerate(channels):
            self.register_buffer(f"keys_{layer}", torch.empty(0, width))
            self.register_buffer(f"frozen_{layer}", torch.empty(0, width), persistent=False)
            self.register_buffer(f"owners_{layer}", torch.empty(0, dtype=torch.long), persistent=False)
            self.register_buffer(f"weights_{layer}", torch.empty(0), persistent=False)
            self.register_buffer(f"centre_{layer}", torch.zeros(width))
        self.register_buffer("mean", torch.zeros(len(channels)))
        self.register_buffer("std", torch.ones(len(channels)))
        self.mean: Tensor
        self.std: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether no reference has been stored yet."""
        return self.keys(0).shape[0] == 0 and self.frozen(0).shape[0] == 0

    @property
    def references(self) -> int:
        """How many references the rows come from; 0 after loading, when that is no longer known."""
        owners = self.owners(0)
        return int(owners.unique().numel())

    def keys(self, layer: int) -> Tensor:
        """Adapted rows ``(R_l, C_l)`` of a layer, as long as their weight."""
        return getattr(self, f"keys_{layer}")

    def frozen(self, layer: int) -> Tensor:
        """Centred rows ``(R_l, C_l)`` of a layer as the tower made them."""
        return getattr(self, f"frozen_{layer}")

    def weighted(self, layer: int, rows: Tensor) -> Tensor:
        """Adapted unit rows ``(R_l, C_l)`` of a layer, made as long as a distance from them counts."""
        return rows * getattr(self, f"weights_{layer}")[:, None]

    def centred(self, tokens: list[Tensor]) -> list[Tensor]:
        """Tokens ``(B, N_l, C_l)`` of each layer less the share of their mean over the references."""
        return [layer_tokens - getattr(self, f"centre_{layer}") for layer, layer_tokens in enumerate(tokens)]

    def owners(self, layer: int) -> Tensor:
        """Index ``(R_l,)`` of the reference that each row comes from."""
        return getattr(self, f"owners_{layer}")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.variable_buffers:
            destination[prefix + name] = destination[prefix + name].half()

    @torch.no_grad()
    def fill(self, tokens: list[Tensor], owners: Tensor, generator: torch.Generator) -> None:
        """Take in the tokens of all views of the references, thinned to ``max_rows`` a layer; `store_keys` follows.

        Args:
            tokens: Aggregated tokens ``(V, N_l, C_l)`` of each layer, as the tower made them.
            owners: Reference index ``(V,)`` of each view.
            generator: CPU generator of the thinning.
        """
        for layer, layer_tokens in enumerate(tokens):
            setattr(self, f"centre_{layer}", CENTRING * layer_tokens.float().mean(dim=(0, 1)))
        for layer, layer_tokens in enumerate(self.centred(tokens)):
            rows = layer_tokens.flatten(0, 1).float()
            unit = F.normalize(rows, dim=-1)
            kept = greedy_coreset(unit, self.max_rows, generator)
            setattr(self, f"weights_{layer}", spacing_weights(unit[kept]))
            setattr(self, f"frozen_{layer}", rows[kept])
            setattr(self, f"owners_{layer}", owners.to(rows.device).repeat_interleave(layer_tokens.shape[1])[kept])

    @torch.no_grad()
    def store_keys(self, keys: list[Tensor]) -> None:
        """Weigh the adapted unit rows ``(R_l, C_l)`` of each layer and keep them as what inference matches against."""
        for layer, rows in enumerate(keys):
            # Rounded to half precision, as `state_dict` stores them: a reloaded model gives the same scores.
            setattr(self, f"keys_{layer}", self.weighted(layer, rows.detach()).half().float().contiguous())

    @torch.no_grad()
    def store_statistics(self, distances: list[Tensor]) -> None:
        """Keep mean and deviation of leave-one-out distances of normal patches, any shape, one tensor a layer."""
        self.mean.copy_(torch.stack([d.float().mean() for d in distances]))
        self.std.copy_(torch.stack([d.float().std().clamp_min(1e-4) for d in distances]))

    def distances(
        self, tokens: list[Tensor], keys: list[Tensor] | None = None, own: Tensor | None = None
    ) -> list[Tensor]:
        """Distance of every query token from its nearest row less half of the image's mean distance, per layer.

        Args:
            tokens: Adapted unit tokens ``(B, N_l, C_l)`` of each layer.
            keys: Adapted and weighted rows to match against instead of the stored ones (training).
            own: Reference index ``(B,)`` of each query; its rows are left out where other references exist.

        Returns:
            ``(B, N_l)`` of each layer.

        Raises:
            RuntimeError: If the bank is empty.
        """
        if self.is_empty:
            msg = "VTFusion has no reference images yet: run fit or train first, or load a checkpoint."
            raise RuntimeError(msg)
        leave_out = own is not None and self.references > 1
        result = []
        for layer, layer_tokens in enumerate(tokens):
            rows = self.keys(layer) if keys is None else keys[layer]
            blocked = own[:, None] == self.owners(layer)[None] if leave_out and own is not None else None
            # Half precision cannot tell small distances apart: 1 - cos has steps of 0.004 there.
            with torch.autocast(layer_tokens.device.type, enabled=False):
                distance = nearest_distance(layer_tokens.float(), rows.float(), blocked)
                result.append(distance - MEAN_SHARE * distance.mean(dim=1, keepdim=True))
        return result

    def standardise(self, distances: list[Tensor]) -> list[Tensor]:
        """Distances in units of the leave-one-out deviation of normal patches."""
        return [(d - self.mean[i]) / self.std[i] for i, d in enumerate(distances)]
