"""A family as one thing to talk to.

`frontend` is what users hold, whatever is behind it: `local`, all models in this process, or
`engine`, the models as actors on Ray. `chat` is how conversations become prompts. `options` are
what a request may set, `limits` what it may ask for, `output` is what comes back. `actors` are what
runs on Ray, `placement` says where, `capacity` what the cluster has or may get, `checks` what is
wrong with a family before it starts.
`transport` is who talks to whom: members, keys, requests and chunks; `paths` is how logits
travel, `sharing` how models of one worker have one plan.
"""
