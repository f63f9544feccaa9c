"""A stand-in for CUDA devices: torch's own Python wrappers over stubbed C functions, fake tensors, counted memory.

It runs the fast path at the published sizes on a CPU-only build of torch and computes nothing. What it knows:

| module       | what it stands for                                                            |
| ------------ | ----------------------------------------------------------------------------- |
| `memory`     | the caching allocator: live bytes, pools of graphs, pinned host memory        |
| `runtime`    | the C functions of `torch._C`: devices, streams, events, graphs, fractions    |
| `tensors`    | what tensors do: fake operations, host synchronizations, values the host asks |
| `launches`   | Triton: every launch is bound and recorded, none runs                         |
| `checkpoint` | a checkpoint folder of the published sizes: true headers, no data             |
| `layouts`    | cuDNN: which operands and results of convolutions are NHWC, and what is copied |
| `requests`   | a pipeline and the requests of the tests; `worker` runs them in a process     |

A stand-in takes the whole process, so the tests call `worker` in processes of their own.
"""
