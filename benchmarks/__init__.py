"""The benchmark suite behind `fusedattn bench` and `pytest benchmarks`.

versions.py         what a version of a case is, which are ours, how they are built
harness.py          clocks, interleaved turns, percentiles, memory, the machine's limits
accuracy.py         the tolerance rule, on a sample of a large result
attention_cases.py  the attention cases: their work, grids and inputs
attention_peers.py  the versions that stand beside each other in one case
option_rules.py     attention's options, each as one rule on pairs of a query and a key
option_cases.py     their cases: work, grids and inputs
option_peers.py     the versions that stand beside each other in one of them
option_accuracy.py  the tolerance rule for these; dropout by statistics
rowwise_cases.py    the cases of norms, softmax, positions and SwiGLU
rowwise_peers.py    those ops in fusedattn, PyTorch and Liger, and what the oracle says
figures.py          a version's rates, share of the limit and ratios
run.py              a case's versions side by side, and the row of the result that it gives
ahead.py            compiles what a GPU's grids need before they are timed
model_cases.py      the cases of whole models, those of transformers: sizes and inputs
model_run.py        such a model as it comes, compiled and patched: same results, then speed
model_report.py     their table and plot
transformer.py      the reference transformers trained side by side
report.py           JSON, CSV and terminal tables
summary.py          a run in words, and against an older one
plots.py            plots
markdown.py         a kept run's figures as Markdown tables
suite.py            the whole run
choice.py           what of it is run where the user names ops, shapes, dtypes or peers
"""
