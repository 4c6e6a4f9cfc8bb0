"""What docs/benchmarks.md says in its author's words: none of it is a number of a result file."""

from __future__ import annotations

HEAD = """\
# Benchmarks

<!-- Drawn by scripts/benchmark_docs.py; change that, or the result files, and run it again. -->

Drawn by [scripts/benchmark_docs.py](../scripts/benchmark_docs.py) from the files in
[benchmarks/results/h200](../benchmarks/results/h200). Every number below comes from the file named above it, which holds
medians and percentiles or every run, the device, the driver, versions, the command, and a digest of the package's sources. A
number belongs to those sources and to no others: `python3 scripts/source_commit.py DIGEST` names the commit that has them.
"""

METHOD = """\
## Method

**Ours and peers in one run.** All loops of one context are made and warmed up, then visited in turn, in the same order round by
round, so that slow drift hits all alike. A power limit does not: a loop that draws more power is slowed more, and so is the loop
that comes next, which the clocks beside the times show. The read ceiling is measured in the same rounds.

**The floor.** A decode step at batch 1 has to read every weight once, and the keys and values of every cached token. Those
bytes over the read ceiling are the time that no step which reads them from memory can beat. The ceiling is what a kernel that
does nothing else reads from the same GPU, the faster of two ways (bulk copies through shared memory, plain loads); an XOR of all
words proves that they are read. "x floor" is a time over the floor, "share of the read ceiling" the floor over a time.

**Times.** `bench full` and `bench decode`: wall time of whole greedy generate loops, as a caller waits for them; per output token
after the first, and to the first token apart; a time is the median over runs of the mean over a run's tokens, with fewer runs of transformers eager, which each table says;
below the medians, the 10th and 90th percentiles. `bench
layer`: the decoder layers alone, without embedding and LM head, between CUDA events; the median of at least 100 steps (of slow
peers fewer, where the file says so).

**Peers** run on the same tensors as ours. *transformers eager* is `generate` as its users call it. *transformers CUDA graph* and
*transformers compile* (`torch.compile`, mode reduce-overhead) are written kinder than its users have it: a static cache just long
enough, and the whole step captured or compiled: model, LM head, argmax, the feeding back of the token and the keeping of it for later. torch.compile has the
settings of that mode and no others: no search for faster kernels (max-autotune). In `bench full` and `bench decode` its guards are not asked again
before each step (`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`), so that the host, which may be slow, is ahead of the GPU. (Files of
sources `6922ade3` are of a loop that asked them, and fed the token back between two graphs.) The prompt, and so the first token, of both is the plain model's
over that cache. In `bench layer` all three
run the model's forward from the residual stream, over such a cache: layers, attention mask, rotary tables and final norm.

**Ours.** `split`: regular launches. `fused`: one cooperative launch with thread-block clusters a layer. `graph`: the fused layers
in one CUDA graph. `model`: whole steps, one or several a launch. (`split graph`, in the tables of layers: the launches of `split` in a
CUDA graph.) All give the same bits, and a run whose tokens or bits differ is marked so.
"""

TWICE = """\
`bench full` and `bench decode` time the same loops. These files hold the same contexts of a model, each measured in a process of its own, with the
sources whose digest begins as said and, it may be, on another GPU of the same name. Where digests differ, so may kernels, and torch.compile's loop where
one is `6922ade3`, as said above. Mode `model`, medians; the change is from the first to the second.
"""

LIMITS = """\
## What the numbers do not show

- Other GPUs, batches of more than one stream, quantised weights, speculative decoding: nothing of that was measured.
- Engines beside transformers: none is in these runs.
- Peers at most contexts. Compiling takes long at each, so that most files have peers at the first one alone; "–" means not measured.
- Random weights have a model's shapes and nothing of its knowledge. A step does the same work whatever the values are, but for the second step
  of a LayerNorm, which rows take whose mean is larger than their deviation ([lab/results/one_step_norm.txt](../lab/results/one_step_norm.txt)
  has steps with two for every row); texts and perplexity need a checkpoint.
- The host. Loops that launch many kernels a token (transformers eager; of ours `split` and `fused`; for models of a few hundred
  million parameters also our `graph`) take as long as the host needs to launch them; on another machine, or in another minute, they
  may be twice as fast or as slow, and so may what is said of ours beside them. Time to the first token of
  transformers eager holds the preparations of its `generate`.
- GPUs of one name differ, in what they read from memory and in when they come to their power limit, and these files are of several. Above
  each table is the ceiling of its run; the ratio to it moves by some percent too, at long contexts most
  ([lab/decode_step.md](../lab/decode_step.md) has the same kernels on two of them).
- Clocks are as the driver sets them. Ratios within one run are worth more than times of different runs. A GPU that reads at its
  memory's speed can be above its power limit, to which the driver then brings it back by lower clocks
  ([lab/results/power.txt](../lab/results/power.txt)). Where slow peers are measured, the GPU rests in between, and ours begins cool; at other contexts it does not, as the power in
  the tables shows: a long stream by itself is like those. `bench full`
  and `bench decode` write down clock and power over the runs, prompts included, where the extra `clocks` is installed, and runs last long enough for a look.
- Peak memory is that of PyTorch's allocator: weights and what one loop holds beside them, without the CUDA context.
- Kernels are compiled before anything is timed; the first use of a model on a machine takes longer.
"""
