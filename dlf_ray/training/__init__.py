"""Where experts come from, and how several become one.

`train` is a loop in plain torch, `demo` a tiny family on a `corpus`. `merge` makes one model of
several as a `recipe` says, by a method of `merging`, from the tensors in their `checkpoints`.
"""
