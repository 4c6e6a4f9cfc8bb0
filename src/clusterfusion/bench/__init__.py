"""Measurements: times beside the read ceiling of the GPU and beside other implementations, in one run.

`layer`         `clusterfusion bench layer`: the decoder layers of a model alone
`options`       what to measure, checked
`costs`         bytes that a step reads, and the time that no step can beat
`samples`       times of repeated work: round robin over candidates; median and percentiles
`device_timer`  one sample on a GPU, and the work before it that makes samples alike
`read_ceiling`  bytes a second that this GPU reads
`forms`         our own decoder layers in their launch forms
`peers`         transformers, on the same weights
`environment`   device, versions, digest of the sources: what a result file needs to be evidence
`report`        the results as data, JSON and a table
"""
