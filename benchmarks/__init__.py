"""The benchmark suite behind `fusedattn bench` and `pytest benchmarks`.

harness.py        clocks, interleaved turns, percentiles, memory, the machine's limits
accuracy.py       the tolerance rule, on a sample of a large result
peers.py          the versions that stand beside each other in one case
attention.py      the attention cases and what one row of the result says
rowwise.py        the same for norms, softmax, rotary and sinusoidal positions
rowwise_peers.py  those ops in fusedattn, PyTorch and Liger, and what the oracle says
figures.py        a version's rates, share of the limit and ratios
transformer.py    the reference transformers trained side by side
report.py         JSON, CSV and terminal tables
plots.py          plots
markdown.py       a kept run's figures as Markdown tables
suite.py          the whole run
"""
