"""The commands of `fxdbsr`, one file each: `add_arguments(parser)`, then `run(args)`, which returns the exit code."""
