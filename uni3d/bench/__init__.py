"""Speed and memory of a training run on this machine, for `uni3d bench`.

A config names a shape and not a model, so what trains is a GPT of that shape that comes with uni3d (`model`),
on random tokens. The engine, its loader, the topology, precision and optimizer are those of the config.
Nothing is written but the traces and pictures that are asked for.

Each rank does this in turn (`measure`):

1. Warm-up steps.
2. Timed steps, with nothing added to them: tokens/s, the time of a step, MFU, peak memory.
3. Steps whose parts are timed: data, forward, backward, step. On a CPU by the clock. On a GPU by events on
   the stream that computes, which no host waits for: synchronizing at each part would forbid the overlap that
   is to be measured. So a collective beside the backward pass counts as far as computing waits for it.
4. Two steps under torch's profiler: the time of collectives by kind, and the trace. A collective lasts from
   its start on this rank, so waiting for a slower rank is in it; it may overlap others and computing.
5. One step in which each pass of each micro batch is timed by the clock, for a picture; on a GPU the host
   waits for each of them.

Modules:

    request    what is to be measured, from a config and options
    model      the GPT, and its tokens
    measure    the measurement on one rank
    collectives  times of collectives in a profile
    local_ranks  ranks on this machine
    report     the figures of all ranks as one answer
"""
