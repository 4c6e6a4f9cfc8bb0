"""`bench trace`: where the time of one decode step of mode model goes, as each CTA recorded it on the GPU.

`options`   what to record, checked
`measure`   the run: steps in a row, of which the last is recorded
`timeline`  a record on one time axis: when each CTA passed what
`summary`   its figures: shares of the time, waits by dependency, skew, bytes a second
`chrome`    a timeline as a file for Perfetto (ui.perfetto.dev) and Chrome's about:tracing
`tables`    the summary for readers
"""
