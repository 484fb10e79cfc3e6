"""How long VTFusion takes beside its own bare tower, PatchCore and WinCLIP, and what it needs.

``python -m benchmarks.latency`` prepares each variant as the file that one would deploy, loads each into a process of
its own, and asks these processes for one batch after the other, in turn, so that a change in the machine's load meets
all of them alike. Each round gives one ratio to the bare tower; medians and quartiles are of rounds. Processor time,
which other programs disturb less, is given beside the time on the clock.
"""
