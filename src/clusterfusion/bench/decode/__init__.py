"""`bench decode`: time per output token of whole generate loops, ours in every mode and transformers', in one run.

`options`   what to measure, checked
`loops`     what is timed: a prompt taken in, and tokens chosen one by one; our modes
`peers`     transformers' loops: as its users call it, compiled, and as one CUDA graph
`measure`   the run: every round visits every loop and the read ceiling
`report`    the results as data and JSON
`tables`    as a table, Markdown and lines
"""
