"""From logits to tokens. Tensors, tokens and plans: nothing here knows of Ray or of sockets.

`coordinator` is the loop of a step, and reads like the life of a token. `scheduler` decides what is
computed, `slots` knows what every model's cache holds; `groups` are rows that are fused together,
`fusion` weighs the experts, `structured` bars what leads out of an answer's shape, `sampling` draws
the token, `text` turns tokens into text. `stream` is a request under way, `losses` what it means
when a model is lost, `telemetry` what is counted and timed.
"""
