"""A model as an encoder uses it: a transformer, its tokenizer, and what makes a text's vector of its tokens'.

Two classes with one face: ``Bundle`` needs nothing but transformers, ``ModuleBundle`` is the view of a
SentenceTransformer, whatever modules that has. Letters: N texts, L tokens of the longest, C width, D numbers of a
vector.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

VECTOR = "sentence_embedding"  # where modules of sentence-transformers look for a text's vector and leave it


class Bundle(nn.Module):
    """A transformer with 'mean' or 'cls' pooling, a cut to the first ``dims`` numbers and normalisation.

    Weights bear the names that they have in a SentenceTransformer (``0.model.…``), for fingerprints hang on them.
    ``similarity`` is what the files say vectors are to be compared by; koret itself takes the cosine.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        normalizes: bool = False,
        dims: int | None = None,
        prompts: dict[str, str] | None = None,
        similarity: str = "cosine",
    ) -> None:
        super().__init__()
        self.add_module("0", nn.ModuleDict({"model": backbone}))
        self.tokenizer, self.pooling, self.normalizes, self.dims = tokenizer, pooling, normalizes, dims
        self.prompts, self.similarity = prompts or {}, similarity

    @property
    def backbone(self) -> nn.Module:
        """The Hugging Face transformer."""
        return self.get_submodule("0")["model"]

    @backbone.setter
    def backbone(self, module: nn.Module) -> None:
        self.get_submodule("0")["model"] = module

    @property
    def max_seq_length(self) -> int | None:
        return self.tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        self.tokenizer.model_max_length = length

    @property
    def dimensions(self) -> int:
        return self.dims or self.backbone.config.hidden_size

    @property
    def kinds(self) -> list[str]:
        """The modules that sentence-transformers would make of it, by their names."""
        return ["Transformer", *(kind for kind, _ in self.describe())]

    def describe(self) -> list[tuple[str, dict[str, Any]]]:
        """What follows the transformer, module by module: name and settings as sentence-transformers saves them."""
        width, names = self.backbone.config.hidden_size, {"module_input_name": VECTOR, "module_output_name": VECTOR}
        modules: list[tuple[str, dict[str, Any]]] = [
            ("Pooling", {"embedding_dimension": width, "pooling_mode": self.pooling, "include_prompt": True})
        ]
        if self.dims is not None:
            cut = {"in_features": width, "out_features": self.dims, "bias": False}
            modules.append(("Dense", {**cut, "activation_function": "torch.nn.modules.linear.Identity", **names}))
        if self.normalizes:
            modules.append(("Normalize", names))
        return modules

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask (N, L), padded on the right -> (N, D), by the transformer's own padded forward."""
        states = self.backbone(input_ids=tokens, attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            vectors = states[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)
            wide = torch.promote_types(states.dtype, torch.float32)
            vectors = ((states * weights).sum(1, dtype=wide) / weights.sum(1, dtype=wide)).to(states.dtype)
        vectors = vectors[:, : self.dims]
        return F.normalize(vectors, dim=-1) if self.normalizes else vectors


class ModuleBundle:
    """A SentenceTransformer seen as a ``Bundle``: a view, for the model stays what it is."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    @property
    def backbone(self) -> nn.Module:
        """The Hugging Face transformer in the first module."""
        return self.model[0].model

    @backbone.setter
    def backbone(self, module: nn.Module) -> None:
        self.model[0].model = module

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.model[0].processor = tokenizer

    @property
    def pooling(self) -> str:
        """The pooling mode of the second module, where that pools."""
        return self.model[1].pooling_mode

    @property
    def prompts(self) -> dict[str, str]:
        return self.model.prompts or {}

    @prompts.setter
    def prompts(self, prompts: dict[str, str]) -> None:
        self.model.prompts = prompts

    @property
    def similarity(self) -> str:
        return self.model.similarity_fn_name

    @property
    def max_seq_length(self) -> int | None:
        return self.model.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        self.model.max_seq_length = length

    @property
    def dimensions(self) -> int:
        return int(self.model.get_embedding_dimension())

    @property
    def kinds(self) -> list[str]:
        """The modules, by the names of their classes."""
        return [type(module).__name__ for module in self.model]

    def describe(self) -> list[tuple[str, dict[str, Any]]]:
        """What follows the first module, module by module: name and settings as sentence-transformers saves them."""
        modules = list(self.model)[1:]
        return [(type(m).__name__, m.get_config_dict() if hasattr(m, "get_config_dict") else {}) for m in modules]

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and their mask (N, L), padded on the right -> (N, D), through all modules."""
        return self.model({"input_ids": tokens, "attention_mask": mask, "modality": "text"})[VECTOR]


def open_bundle(model: Bundle | SentenceTransformer) -> Bundle | ModuleBundle:
    """The face of ``model`` that an encoder uses."""
    return model if isinstance(model, Bundle) else ModuleBundle(model)


def is_sentence_transformer(model: Any) -> bool:
    """Whether ``model`` is a SentenceTransformer. Where nobody has imported the library, nothing is."""
    library = sys.modules.get("sentence_transformers")
    return library is not None and isinstance(model, library.SentenceTransformer)
