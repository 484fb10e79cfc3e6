"""The parts of the demo data set, free of defects or with one built into their shape.

Each function here builds the surface of one part. Everything that differs from one good part to the next (pose,
material, wear of the tool) is drawn from ``rng``, in the same order whether or not there is a fault, so that a faulty
part has an exact faultless twin.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anomalib_vtfusion.data.rendering import (
    CANVAS,
    Array,
    Color,
    Light,
    Surface,
    box_distance,
    cast_shadow,
    coordinates,
    inside,
    length,
    lookup,
    mix,
    noise,
    pose,
    resize,
    smoothstep,
)


@dataclass
class Fault:
    """A defect in the shape of a part: its kind, its strength in (0, 1] and a generator for where and how."""

    kind: str
    strength: float
    rng: np.random.Generator


Built = tuple[Surface, Array | None]
"""A surface and, where the fault is in the shape, its coverage ``(CANVAS, CANVAS)`` in [0, 1]."""


def _tinted(value: Array, color: Color) -> Array:
    """Turn a grey map into ``(CANVAS, CANVAS, 3)`` of one colour."""
    return value[..., None] * np.asarray(color, dtype=np.float32)


def _dyed(rng: np.random.Generator, color: Color, spread: float) -> Color:
    """Return ``color`` as the next batch of material has it."""
    level = 1.0 + rng.normal(0.0, spread)
    red, green, blue = (max(0.01, c * level * (1.0 + rng.normal(0.0, spread / 3))) for c in color)
    return red, green, blue


def washer(rng: np.random.Generator, light: Light, fault: Fault | None = None) -> Built:
    """A turned steel washer with a keyway and three punch marks, at any angle, on a conveyor belt. Fault: ``nick``."""
    u, v = pose(rng, 0.035, math.pi)
    outer, inner = 0.355 + rng.normal(0, 0.003), 0.150 + rng.normal(0, 0.002)
    radius, angle = length(u, v), np.arctan2(v, u)

    belt = 1.0 + 0.10 * noise(rng, 150) + 0.05 * noise(rng, 5, 2)
    belt_color = _dyed(rng, (0.055, 0.075, 0.095), 0.10)
    turning = lookup(rng.standard_normal((CANVAS, 24), dtype=np.float32), angle * (12 / math.pi), radius * CANVAS)
    cloud = noise(rng, 4, 3)
    steel_color = _dyed(rng, (0.36, 0.355, 0.34), 0.05)

    def outline(rim: Array | float) -> Array:
        bore = np.minimum(radius - inner, box_distance(u - inner, v, 0.022, 0.026, 0.004))
        return np.maximum(radius - rim, -bore)

    distance = outline(outer)
    missing = None
    if fault is not None and fault.kind == "nick":
        where = fault.rng.uniform(-math.pi, math.pi)
        half_angle = 0.07 + 0.13 * fault.strength
        depth = 0.016 + 0.07 * fault.strength
        turn = np.abs((angle - where + math.pi) % (2 * math.pi) - math.pi)
        torn = resize(fault.rng.standard_normal((1, 60), dtype=np.float32), CANVAS, 1)[0]
        ragged = torn[((angle + math.pi) * ((CANVAS - 1) / (2 * math.pi))).astype(np.int32)]
        rim = outer - depth * smoothstep(half_angle, 0.55 * half_angle, turn) * (1.0 + 0.10 * ragged)
        broken = outline(np.minimum(rim, outer))
        missing = np.clip(inside(distance) - inside(broken), 0.0, 1.0)
        distance = broken

    part = inside(distance)
    height = 0.010 * smoothstep(0.0, -0.020, distance)
    for turn_by in (-0.22, 0.0, 0.22):
        mark = length(u + 0.255 * math.cos(turn_by), v - 0.255 * math.sin(turn_by))
        height -= 0.004 * smoothstep(0.013, 0.003, mark)

    # Circular tool marks reflect the lamp in two opposite wedges.
    x, y = coordinates()
    towards = (x * light.direction[0] + y * light.direction[1]) / (
        length(x, y) * math.hypot(*light.direction[:2]) + 1e-3
    )
    wedge = towards**2
    metal = 0.62 + 0.06 * turning + 0.03 * cloud + 0.55 * wedge**2
    ground = belt * (1.0 - 0.75 * cast_shadow(part, light, 0.020, 0.025))
    albedo = mix(_tinted(ground, belt_color), _tinted(metal, steel_color), part[..., None])
    gloss = part * (0.06 + 0.30 * wedge**2 * (1.0 + 0.20 * turning))
    return Surface(albedo, height.astype(np.float32), gloss, part, shininess=14.0), missing


def plate(rng: np.random.Generator, _light: Light, fault: Fault | None = None) -> Built:
    """A perforated, brushed steel sheet that fills the image. Faults: ``blocked_hole``, ``deformed_hole``."""
    u, v = pose(rng, 0.06, 0.06)
    pitch, bore = 0.150, 0.043 + rng.normal(0, 0.0008)
    brushing = lookup(rng.standard_normal((CANVAS, 40), dtype=np.float32), u * 14 + 20, v * (0.8 * CANVAS))
    cloud = noise(rng, 3, 3)
    reflection = np.tanh(0.6 * noise(rng, 2))
    steel = _dyed(rng, (0.34, 0.345, 0.355), 0.06)
    below = _dyed(rng, (0.020, 0.022, 0.026), 0.2)

    column, row = np.round(u / pitch), np.round(v / pitch)
    du, dv = u - column * pitch, v - row * pitch
    distance = length(du, dv) - bore

    covered, plug = None, None
    if fault is not None and fault.kind in {"blocked_hole", "deformed_hole"}:
        i, j = (int(value) for value in fault.rng.integers(-2, 3, size=2))
        chosen = (column == i) & (row == j)
        if fault.kind == "deformed_hole":
            turn = fault.rng.uniform(0, math.pi)
            long, short = 1.0 + 0.12 + 0.45 * fault.strength, 1.0 - 0.10 * fault.strength
            along = du * math.cos(turn) + dv * math.sin(turn)
            across = dv * math.cos(turn) - du * math.sin(turn)
            bent = np.where(chosen, (length(along / long, across / short) - bore) * short, distance)
            covered = np.abs(inside(bent) - inside(distance))
            distance = bent
        else:
            # Swarf or paint that closes the hole from one side; at full strength nothing is left open.
            turn = fault.rng.uniform(0, 2 * math.pi)
            level = bore * (-0.25 + 1.4 * fault.strength)
            lumps = 0.006 * noise(fault.rng, 40, 2)
            front = du * math.cos(turn) + dv * math.sin(turn) - level + lumps
            plug = np.where(chosen, inside(front, 3.0) * inside(distance, 2.0), 0.0).astype(np.float32)
            covered = plug

    part = inside(-distance)
    height = -0.008 * smoothstep(0.010, -0.002, distance)
    metal = 0.82 + 0.055 * brushing + 0.03 * cloud + 0.14 * reflection
    depths = _tinted(0.6 + 0.8 * smoothstep(-0.02, 0.06, -du - dv), below)
    albedo = mix(depths, _tinted(metal, steel), part[..., None])
    gloss = part * np.clip(0.10 + 0.05 * reflection + 0.02 * brushing, 0.0, None)
    if plug is not None and fault is not None:
        filling = _tinted(0.60 + 0.13 * noise(fault.rng, 90, 2), (0.20, 0.17, 0.14))
        albedo = mix(albedo, filling, plug[..., None])
        height += plug * 0.004 * noise(fault.rng, 70)
    return Surface(albedo, height.astype(np.float32), gloss.astype(np.float32), part, shininess=10.0), covered


def tile(rng: np.random.Generator, _light: Light, _fault: Fault | None = None) -> Built:
    """A polished granite tile that fills the image: grains of three minerals. Its faults lie on the surface."""
    base = _dyed(rng, (0.33, 0.315, 0.30), 0.07)
    veins = noise(rng, 5, 4, 0.65)
    feldspar = smoothstep(0.2, 0.9, noise(rng, 44, 2) + 0.3 * veins)
    quartz = smoothstep(0.55, 1.15, noise(rng, 52, 2))
    mica = smoothstep(1.25, 1.75, noise(rng, 84, 2) - 0.15 * veins)
    fine = noise(rng, 200)

    albedo = _tinted(1.0 + 0.10 * veins + 0.03 * fine, base)
    albedo = mix(albedo, _tinted(1.0 + 0.03 * fine, _dyed(rng, (0.42, 0.35, 0.30), 0.05)), 0.75 * feldspar[..., None])
    albedo = mix(albedo, _tinted(1.0 + 0.02 * fine, (0.52, 0.51, 0.49)), 0.60 * quartz[..., None])
    albedo = mix(albedo, _tinted(1.0 + 0.20 * fine, (0.085, 0.080, 0.082)), 0.85 * mica[..., None])
    height = 0.0001 * fine
    gloss = 0.05 + 0.02 * quartz
    return Surface(albedo, height, gloss.astype(np.float32), np.ones((CANVAS, CANVAS), np.float32), 20.0), None


def fabric(rng: np.random.Generator, _light: Light, fault: Fault | None = None) -> Built:
    """A twill cloth, dark warp over light weft, that fills the image. Fault: ``missing_thread``."""
    u, v = pose(rng, 0.03, 0.035)
    pitch = 1 / 38 * (1.0 + rng.normal(0, 0.01))
    u = u + 0.0035 * noise(rng, 4)
    v = v + 0.0035 * noise(rng, 4)
    warp_level, weft_level = rng.normal(1.0, 0.07, 64), rng.normal(1.0, 0.07, 64)
    fibers = noise(rng, 120)
    worn = noise(rng, 5, 2)
    warp_color, weft_color = _dyed(rng, (0.055, 0.10, 0.19), 0.08), _dyed(rng, (0.40, 0.40, 0.37), 0.05)

    column, row = np.floor(u / pitch), np.floor(v / pitch)
    across_warp, across_weft = u / pitch - column - 0.5, v / pitch - row - 0.5
    i, j = column.astype(np.int32), row.astype(np.int32)
    weft_on_top = (i + j) % 3 == 0
    warp_round = np.sqrt(np.clip(1.0 - (2 * across_warp) ** 2, 0.04, 1.0))
    weft_round = np.sqrt(np.clip(1.0 - (2 * across_weft) ** 2, 0.04, 1.0))
    warp_bow = 1.0 - 0.5 * np.abs(2 * across_weft) ** 2
    weft_bow = 1.0 - 0.7 * np.abs(2 * across_warp) ** 2

    warp = _tinted((0.72 + 0.5 * warp_round * warp_bow) * warp_level[i % 64].astype(np.float32), warp_color)
    weft = _tinted((0.62 + 0.5 * weft_round * weft_bow) * weft_level[j % 64].astype(np.float32), weft_color)
    height = 0.25 * pitch * np.where(weft_on_top, weft_round * weft_bow, warp_round * warp_bow)

    gap = None
    if fault is not None and fault.kind == "missing_thread":
        line = int(fault.rng.integers(-12, 12))
        start = fault.rng.uniform(-0.46, 0.31 - 0.55 * fault.strength)
        end = start + 0.15 + 0.55 * fault.strength
        run = smoothstep(start, start + 0.01, u) * smoothstep(end, end - 0.01, u)
        gap = np.where((row == line) | ((row == line + 1) & (fault.strength > 0.8)), run, 0.0).astype(np.float32)
        lost = (0.35 + 0.6 * fault.strength) * gap
        # Where the thread is gone the warp above it sags and dark ground shows between.
        weft = mix(weft, _tinted(0.8 + 0.1 * fibers, (0.035, 0.045, 0.065)), lost[..., None])
        warp = warp * (1.0 - 0.30 * lost[..., None])
        height = height * (1.0 - 0.6 * lost)

    albedo = np.where(weft_on_top[..., None], weft, warp)
    albedo = albedo * (1.0 + 0.07 * fibers + 0.05 * worn)[..., None]
    whole = np.ones((CANVAS, CANVAS), np.float32)
    return Surface(albedo.astype(np.float32), height.astype(np.float32), 0.0 * whole, whole), gap


_PINS = (6, 2)
_PIN_PITCH = (0.102, 0.112)
_PIN_HALF_WIDTH = 0.0185


def _bend_pins(fault: Fault | None, offset: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], Array, Array]:
    """Return where pins stand ``(2, 6, 2)``, how far each leans ``(6, 2)`` and which one is faulty ``(6, 2)``."""
    lean, faulty = np.zeros(_PINS, dtype=np.float32), np.zeros(_PINS, dtype=np.float32)
    if fault is None or fault.kind not in {"missing_pin", "bent_pin"}:
        return offset, lean, faulty
    pin = (int(fault.rng.integers(_PINS[0])), int(fault.rng.integers(_PINS[1])))
    faulty[pin] = 1.0
    if fault.kind == "bent_pin":
        turn = fault.rng.uniform(0, 2 * math.pi)
        bend = 0.008 + 0.021 * fault.strength
        offset = offset.copy()
        offset[(slice(None), *pin)] += bend * math.cos(turn), bend * math.sin(turn)
        lean[pin] = fault.strength
    return offset, lean, faulty


def connector(rng: np.random.Generator, light: Light, fault: Fault | None = None) -> Built:
    """A black 2 x 6 pin connector on a tray, seen from above. Faults: ``missing_pin``, ``bent_pin``."""
    u, v = pose(rng, 0.025, 0.06)
    tray = 1.0 + 0.02 * noise(rng, 120) + 0.02 * noise(rng, 3, 2)
    tray_color = _dyed(rng, (0.38, 0.44, 0.45), 0.06)
    grain, flow = noise(rng, 180), noise(rng, 4, 3)
    plastic_color, gold = _dyed(rng, (0.040, 0.041, 0.044), 0.10), _dyed(rng, (0.55, 0.40, 0.13), 0.05)
    offset = rng.normal(0.0, 0.0012, (2, *_PINS))
    shine = rng.normal(1.0, 0.06, _PINS).astype(np.float32)

    body = np.minimum(box_distance(u, v, 0.375, 0.165, 0.018), box_distance(u, v, 0.435, 0.075, 0.025))
    screws = length(np.abs(u) - 0.405, v) - 0.017
    keyway = box_distance(u, v - 0.165, 0.05, 0.022, 0.005)
    shell = np.maximum(body, -np.minimum(screws, keyway))
    part = inside(shell)
    floor = smoothstep(0.003, -0.003, box_distance(u, v, 0.325, 0.115, 0.012))

    # Every pixel belongs to the cell of one pin.
    i = np.clip(np.round(u / _PIN_PITCH[0] + 2.5), 0, 5).astype(np.int32)
    j = np.clip(np.round(v / _PIN_PITCH[1] + 0.5), 0, 1).astype(np.int32)
    cell_u = u - ((i - 2.5) * _PIN_PITCH[0]).astype(np.float32)
    cell_v = v - ((j - 0.5) * _PIN_PITCH[1]).astype(np.float32)

    def pins(where: npt.NDArray[np.float64]) -> tuple[Array, Array, Array]:
        du, dv = (cell - shift.astype(np.float32)[i, j] for cell, shift in zip((cell_u, cell_v), where, strict=True))
        square = inside(box_distance(du, dv, _PIN_HALF_WIDTH, _PIN_HALF_WIDTH, 0.003))
        return square, np.maximum(np.abs(du), np.abs(dv)), du + dv

    bent, lean, faulty = _bend_pins(fault, offset)
    cover, reach, slant = pins(bent)
    changed = None
    if faulty.any():
        changed = np.maximum(cover, pins(offset)[0]) * faulty[i, j]
        if not lean.any():
            cover = cover * (1.0 - faulty[i, j])

    socket = inside(box_distance(cell_u, cell_v, _PIN_HALF_WIDTH + 0.004, _PIN_HALF_WIDTH + 0.004, 0.003))
    pin_shadow = cast_shadow(cover, light, 0.012, 0.012) * floor
    plastic = (
        (1.0 + 0.10 * grain + 0.06 * flow) * (1.0 - 0.45 * floor) * (1.0 - 0.6 * socket) * (1.0 - 0.6 * pin_shadow)
    )
    plastic += 9.0 * inside(length(u + 0.350, v - 0.140) - 0.008)
    ground = tray * (1.0 - 0.7 * cast_shadow(part, light, 0.022, 0.02) * (1.0 - part))
    facets = (0.75 + 0.45 * smoothstep(0.016, 0.006, reach)) * shine[i, j] + 6.0 * slant * lean[i, j]

    albedo = mix(_tinted(ground, tray_color), _tinted(plastic, plastic_color), part[..., None])
    albedo = mix(albedo, _tinted(facets, gold), cover[..., None])
    height: Array = part * (0.010 * smoothstep(0.0, -0.012, shell) - 0.012 * floor) + 0.0004 * grain * part
    height = mix(height, 0.010 * smoothstep(_PIN_HALF_WIDTH, 0.004, reach), cover)
    return Surface(albedo, height, part * 0.025 + 0.22 * cover, part, shininess=18.0), changed
