"""The registered model, as MLflow's models-from-code wants it: answers texts with JSON. No pickle is involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel

MAX_TOKENS = 96


class ShopIntent(PythonModel):
    """`predict(["2 milk please"])` gives `['{"intent":"add_to_cart",...}']`; what is no valid answer is given as the model wrote it."""

    def load_context(self, context: Any) -> None:
        from tasks import runtimes
        from tasks.core import hardware
        from tasks.domain.spec import load_spec

        self._spec = load_spec(str(Path(context.artifacts["spec"]).parent))
        self._model = runtimes.load(context.model_config["runtime"], Path(context.artifacts["model"]), hardware.cores())

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        from tasks.domain import prompt
        from tasks.domain.scoring import compact_json, parse_answer

        conversations = [prompt.messages(self._spec, text) for text in model_input]
        answers = [""] * len(conversations)
        for completion in self._model.generate(conversations, MAX_TOKENS, min(16, max(1, len(conversations)))):
            answer = parse_answer(completion.text, self._spec).answer
            answers[completion.index] = compact_json(answer) if answer else completion.text
        return answers


mlflow.models.set_model(ShopIntent())
