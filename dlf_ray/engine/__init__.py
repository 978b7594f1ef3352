"""A family as one thing to talk to.

`frontend` is what users hold, whatever is behind it: `local`, all models in this process, or
`engine`, the models as actors on Ray. `placement` says where actors go, `capacity` what the cluster
has or may get, `transport` is how plans and logits travel.
"""
