"""`bench full`: everything that `bench decode` times, and perplexity through the decode path, in one run.

`options`   where the text comes from, checked; why there may be no perplexity
`measure`   the run: `bench decode`'s, then the text
`report`    the results as data, JSON, lines and Markdown
"""
