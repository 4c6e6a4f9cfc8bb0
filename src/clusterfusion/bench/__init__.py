"""Measurements: times beside the read ceiling of the GPU, results beside other implementations and float64.

Times (`clusterfusion bench`)

`layer`         `clusterfusion bench layer`: the decoder layers of a model alone
`full`          `clusterfusion bench full`: `decode`, and perplexity; a package
`decode`        `clusterfusion bench decode`: whole generate loops; a package, which says what is in it
`prefill`       `clusterfusion bench prefill`: time to the first token after prompts
`roofline`      `clusterfusion bench roofline`: what this GPU reads, at several sizes
`trace`         `clusterfusion bench trace`: where one step's time goes, as each CTA recorded it; a package
`options`       what `bench layer` is to measure, checked
`costs`         bytes that a step reads, and the time that no step can beat
`samples`       times of repeated work: round robin over candidates; median, percentiles, slope
`device_timer`  one sample on a GPU, and the work before it that makes samples alike
`read_ceiling`  bytes a second that this GPU reads: measured, proved, summarised
`forms`         our own decoder layers in their launch forms
`peers`         transformers, on the same weights
`report`        the results of `bench layer` as data, JSON and a table

Results

`verify`             `clusterfusion verify`: greedy tokens against transformers', bits against other runs and modes
`divergence`         where two decodings part, and whether that was a tie or an error
`quality`            `clusterfusion quality`: both sides' logits and hidden states against float64
`agreement`          KL divergence, top-k overlap, bootstrap intervals
`perplexity`         `clusterfusion perplexity`: decoding, prefill and transformers over the same windows
`truth`              the float64 reference, and the engine's own hidden state
`causal_lm`          transformers' causal language models: greedy, by steps, over a whole text
`texts`              built-in prompts and texts, random tokens, files, public data sets
`evaluation`         what the three share: both sides, facts of a run, progress, JSON
`verify_report`, `quality_report`, `perplexity_report`   their tables, lines and JSON

Both

`results`       what plots and pages read of result files
`plots`         figures of a result, as PNG and SVG
`environment`   device, versions, digest of the sources, command: what a result file needs to be evidence
"""
