"""Where experts come from: `train`, a loop in plain torch, and `demo`, the tiny family."""
