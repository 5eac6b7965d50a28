"""Wan's denoiser with two timesteps: that of the first latent frame and that of all others, each embedded once."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from wanlab.models.blocks import blocks_of
from wanlab.techniques.around import Around


class Rows:
    """What the embedding and the blocks of one network share.

    Attributes:
        first: tokens of the first latent frame in the last forward.
        asked, computed: rows of timesteps that were asked for and that were embedded in the last generation.
        others: forwards whose timesteps were not those of the first frame and of the others, so that all were embedded.
    """

    def __init__(self) -> None:
        self.first = 0
        self.forget()

    def __deepcopy__(self, memo) -> Rows:
        """Copies of a network, such as a compiled one, count together."""
        return self

    def forget(self) -> None:
        """Begin to count anew."""
        self.asked = self.computed = self.others = 0


class TwoRowEmbedding(Around):
    """Embeds two timesteps in place of one for every token.

    What it gives for the blocks has two rows, `[B, 2, 6 D]`; what the last layer takes has a row for each token.
    """

    def __init__(self, inner: torch.nn.Module, patch: tuple[int, ...], rows: Rows) -> None:
        super().__init__(inner)
        self.patch, self.rows = patch, rows

    def tell(self, network: torch.nn.Module, positional: tuple, named: dict) -> None:
        """A hook of the network: how many tokens a latent frame has."""
        latents = positional[0] if positional else named["hidden_states"]
        height, width = (size // part for size, part in zip(latents.shape[-2:], self.patch[-2:], strict=True))
        self.rows.first = height * width * self.patch[0]

    def forward(
        self, timestep, encoder_hidden_states, encoder_hidden_states_image=None, timestep_seq_len=None
    ):
        """As `WanTimeTextImageEmbedding.forward`, with the timesteps of all tokens, `[B * L]`."""
        others = (encoder_hidden_states, encoder_hidden_states_image)
        if timestep_seq_len is None:
            return self.inner(timestep, *others)
        tokens, first = timestep.unflatten(0, (-1, timestep_seq_len)), self.rows.first
        self.rows.asked += tokens.numel()
        ends = torch.stack((tokens[:, 0], tokens[:, -1]), dim=1)  # [B, 2]
        expected = torch.where(
            torch.arange(timestep_seq_len, device=tokens.device) < first, ends[:, :1], ends[:, 1:]
        )
        if not torch.equal(expected, tokens):  # waits for the device, once in a forward
            self.rows.others += 1
            self.rows.computed += tokens.numel()
            return self.inner(timestep, *others, timestep_seq_len=timestep_seq_len)
        self.rows.computed += ends.numel()
        embedded, projected, text, picture = self.inner(ends.flatten(), *others, timestep_seq_len=2)
        spread = [
            embedded[:, row : row + 1].expand(-1, count, -1)
            for row, count in enumerate((first, timestep_seq_len - first))
        ]
        return torch.cat(spread, dim=1), projected, text, picture


class TwoRowBlock(WanTransformerBlock):
    """A block whose modulation has two rows, for the tokens of the first latent frame and for the others."""

    rows: Rows

    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        """`[B, L, D]` to `[B, L, D]`, with the modulation `[B, 2, 6, D]`; as its base with any other."""
        if temb.ndim != 4 or temb.shape[1] == hidden_states.shape[1]:
            return super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        first = self.rows.first
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (
            self.scale_shift_table.unsqueeze(0) + temb.float()
        ).unbind(2)

        normed = modulated(self.norm1(hidden_states.float()), 1 + scale, first, shift).type_as(hidden_states)
        mixed = modulated(_own(self.attn1(normed, None, None, rotary_emb)), gate, first)
        hidden_states = (hidden_states.float() + mixed).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = modulated(self.norm3(hidden_states.float()), 1 + ff_scale, first, ff_shift).type_as(
            hidden_states
        )
        mixed = modulated(_own(self.ffn(normed)), ff_gate, first)
        return (hidden_states.float() + mixed).type_as(hidden_states)


def modulated(
    values: torch.Tensor, factors: torch.Tensor, first: int, shifts: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply the first tokens by one row and the others by another, and add a row each; in place.

    Args:
        values: `[B, L, D]`. factors, shifts: `[B, 2, D]`. first: tokens of the first row.
    """
    for row, part in enumerate((values[:, :first], values[:, first:])):
        part *= factors[:, row : row + 1]
        if shifts is not None:
            part += shifts[:, row : row + 1]
    return values


def _own(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, in memory that nothing else uses."""
    return values.to(torch.float32, copy=True)


def use_two_rows(network: torch.nn.Module) -> Rows:
    """Let a `WanTransformer3DModel` embed two timesteps, in place; what it counts."""
    rows = Rows()
    embedding = TwoRowEmbedding(network.condition_embedder, tuple(network.config.patch_size), rows)
    network.register_forward_pre_hook(embedding.tell, with_kwargs=True)
    network.condition_embedder = embedding
    for block in blocks_of(network):
        block.module.__class__ = TwoRowBlock
        block.module.rows = rows
    return rows
