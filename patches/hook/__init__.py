"""The one attention hook: every method of this pack touches attention through `install.request`, and nothing else does.

A method says where (sites, kinds, heads), who (which rows of the batch), when (a span of sampling) and what, by one of four requests
(see `requests`): share a map, edit weights, read weights, blend outputs. At one call of attention they come in that order, and each
kind in the order of the nodes in the graph: readers see the map that was really used, blends have the last word.

Requests are plain data on a cloned ModelPatcher. While a forward of the model runs, an APPLY_MODEL wrapper puts our override,
chained to the one that is already there, into that forward's own options; a call that nobody asked for, and a forward outside
every span, goes straight to ComfyUI. State lives in a `run.SamplingRun`, born when sampling starts and gone when it ends.
"""
