"""Holds an engine's greedy output against `reference`, and decides ties in the open.

The engine computes in float32, from caches and in batches, so its logits differ from the oracle's
by about 1e-5. Where that turns a choice (two candidates of the grid whose losses, or two tokens
whose logits, agree to within the error), the oracle follows the engine and the tie is counted;
every other difference fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import reference
import torch
from transformers import AutoModelForCausalLM

from dlf_ray import Output

LOSS_ERROR = 1e-4  # relative, of two candidates' losses; plus as much of a squared nat
LOGIT_ERROR = 1e-3  # of two tokens' logits


class Oracle:
    """Plain models of a family: no cache, no batch."""

    def __init__(self, folder: Path, vocab: int = 300) -> None:
        self.folder, self.vocab = folder, vocab
        self.models: dict[str, Any] = {}
        self.tokens = self.ties = 0

    @torch.no_grad()
    def logits(self, name: str, prompt: list[int], generated: list[int]) -> torch.Tensor:
        """What the model says before each generated token, [len(generated), V].

        One full pass gives what a pass per step would: position i sees the tokens up to i only.
        """
        if name not in self.models:
            self.models[name] = AutoModelForCausalLM.from_pretrained(self.folder / name)
        ids = torch.tensor([[*prompt, *generated]])
        full = self.models[name](input_ids=ids, use_cache=False).logits[0, :, : self.vocab]
        return full[len(prompt) - 1 : -1]

    def check(
        self,
        prompt: list[int],
        output: Output,
        experts: tuple[str, ...],
        prompts: dict[str, list[int]] | None = None,
        **how: Any,
    ) -> None:
        """Fails unless every token and every weight of `output` is the oracle's, or a tie."""
        assert output.error is None
        names = ("large", "base", *experts)
        every = [
            self.logits(name, (prompts or {}).get(name, prompt), output.token_ids) for name in names
        ]
        for at, token in enumerate(output.token_ids):
            large, base, *rest = (each[at].double() for each in every)
            answer = reference.fuse(large, base, rest, **how)
            weights = [output.weights[at][name] for name in experts]
            tie = False
            if not all(abs(w - a) < 1e-3 for w, a in zip(weights, answer.weights, strict=True)):
                static = {**how, "rule": "static", "weights": weights}
                loss = reference.fuse(large, base, rest, **static)
                assert how.get("select", "paper") == "paper", (at, weights, answer.weights)
                assert loss.loss <= answer.loss * (1 + LOSS_ERROR) + LOSS_ERROR**2, (
                    at,
                    weights,
                    answer.weights,
                    loss.loss,
                    answer.loss,
                )
                answer, tie = loss, True
            elif token != int(answer.logprobs.argmax()):
                tie = True
            gap = float(answer.logprobs.max() - answer.logprobs[token])
            assert gap <= LOGIT_ERROR, (at, token, int(answer.logprobs.argmax()), gap)
            self.tokens += 1
            self.ties += tie
