"""Where experts come from: `train` is a loop in plain torch, `demo` a tiny family on a `corpus`."""
