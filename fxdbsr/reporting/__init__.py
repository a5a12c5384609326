"""The report: what a model costs, layer by layer. `fxdbsr.report` is `fxdbsr.reporting.build.report`."""
