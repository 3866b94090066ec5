"""Attention and rotary positions in the form that the passes and the engine know, shared by the model families."""

import torch
from torch import nn
from torch.nn import functional as F

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (tokens, 1, head width / 2)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q kᵀ / √width + bias) v of every head: (batch, tokens, heads · width) each, and so is what it returns."""

    def split_heads(tensor: torch.Tensor) -> torch.Tensor:  # to (batch, heads, tokens, width)
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(split_heads(query), split_heads(key), split_heads(value), attn_mask=bias)
    return mixed.transpose(1, 2).flatten(2)


class JointAttention:
    """diffusers' FluxAttnProcessor and JointAttnProcessor2_0: text and image tokens attend to one another.

    Text comes first, as in FLUX; in SD3 it comes last, but without positions the order of tokens changes nothing.
    Values are joined before they are split into heads, so that heads are split as in any other attention.
    """

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        def normed(projected: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:  # (batch, tokens, heads, width)
            heads = projected.unflatten(-1, (attn.heads, -1))
            return heads if norm is None else norm(heads)

        query = normed(attn.to_q(hidden_states), attn.norm_q)
        key = normed(attn.to_k(hidden_states), attn.norm_k)
        value = attn.to_v(hidden_states)
        if encoder_hidden_states is not None:
            text_query = normed(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)
            text_key = normed(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)
            query, key = torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1)
            value = torch.cat([attn.add_v_proj(encoder_hidden_states), value], dim=1)
        if image_rotary_emb is not None:
            query, key = rotate_pairs(query, image_rotary_emb), rotate_pairs(key, image_rotary_emb)
        mixed = attend(query.flatten(2), key.flatten(2), value, attn.heads)
        if encoder_hidden_states is None:
            return self.project(attn, mixed)
        text = encoder_hidden_states.shape[1]
        of_text, of_image = mixed[:, :text], mixed[:, text:]
        # The last block of SD3 has no use for the text any more.
        return self.project(attn, of_image), of_text if attn.context_pre_only else attn.to_add_out(of_text)

    def project(self, attn, mixed: torch.Tensor) -> torch.Tensor:
        """FLUX's single blocks project the output together with that of their feed-forward."""
        return mixed if attn.pre_only else attn.to_out[0](mixed)


def rotate_pairs(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate channels 2 i and 2 i + 1 of x (batch, tokens, heads, width) by the angles of each token's position.

    RoFormer, equation (34) (Su et al. 2021).
    """
    cosine, sine = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


def rotary(angles: torch.Tensor) -> Rotary:
    """Cosines and sines, the same for all heads, of angles (tokens, head width / 2) in radians."""
    return angles.cos()[:, None], angles.sin()[:, None]


def rotary_frequencies(width: int, theta: float) -> torch.Tensor:
    """Radians a position, theta^(-2 i / width), of `width` channels: (width / 2,).

    Computed in float64, as in diffusers, and a constant of the graph in float32. Angles are float32: an error of 1e-5
    radians at position 200.
    """
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width).float()
