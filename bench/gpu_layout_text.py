"""What a report on layouts says of how its tables were made."""

SETTING = """
`bench/gpu.py --layouts`: each layout in processes of its own, one after the other on this machine. Qwen3-30B-A3B with
random weights, bfloat16, routes captured, tokens choosing their experts independently (`spread_routes`), 512 tokens of
context in decode; leaders driven step by step, a real output processor beside them. Medians. tp1 is one device; tpN-tp and
tpN-ep are N with experts cut or whole; dpN is N attention groups (all_gather), dpN-tpM is N groups of M devices. "Over
tp1" is over tp1 with as many requests in all, or, where one device has no memory for so many, over tp1 with the most that
it has room for, in brackets; "as many a group" is over tp1 with as many as each group has. With fewer requests than
groups the others are idle.

**Host**: what the leader does for a step - planning, agreement, launch, what it makes of the step before - without its
wait for the device; it runs while the step before is computed. A peer's host launches and no more.

**Busiest rank**: choices of experts that fall on it, over the mean of the ranks.

**Share** of the layout's own limit: what the bytes of the rank that reads most allow at this run's copy bandwidth (its
weights, the experts that were read, keys and values; in prefill its operations at the matrix rate, if they take longer),
plus what the collectives of hidden states take by themselves, inside a CUDA graph; over the measured time of a step. Of
several dp ranks each has its own device, so their limits are one rank's.

**The next limit** is the largest part of a decode step: bytes and collectives as above; what kernels take beyond both;
gaps in which no kernel runs; what the leader's host takes longer than the device.
"""
ROUTES = """
Greedy generations of a small model of the same widths in float32, each layout a whole engine. "Other bytes than the
first": rows of routes. Where there are some, tokens and routes of both are those of `transformers` with near-ties forced
(a gap below 1e-5 by the reference's own scores); a difference beyond that is a failure.
"""
STALL = """
`bench/stall_everywhere.py`: on every rank but one a conversation with a long history finishes turn after turn, without
pauses; scored is the inter-token latency of the one that has none and decodes a stream: all intervals between its commits.
`off` has the same conversations without routing, `off2` again (noise). In brackets 95 % intervals, bootstrap over rounds.
Lag: from a finish on its leader to the verified answer in its caller's hands. CPU: milliseconds a finish.
"""
PROCESSORS = """
`bench/gpu_processors.py`: requests over HTTP, all at once, their rows by reference. One output processor per node exists
over nodes alone, so here the host is cut into two nodes, whose collectives go without symmetric memory; compare the two
settings of two nodes. Lag: taken ring slots of the recorder that is furthest behind, mean and most, that of the
step in flight among them; in milliseconds by the mean step. CPU: of each processor, share of a core.
"""
