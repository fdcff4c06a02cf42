"""Attention: entropy of its weights by head, float against quantized."""


def attention(floating_taps, taps):
    """Mean entropy of every attention head.

    Args:
        floating_taps, taps (Taps): of the float twin and of the quantized model, filled.

    Returns:
        list[dict]: name, head, float_entropy, entropy (0: one key, 1: all keys alike),
        dead (share of rows that the quantizer has set to zero throughout).
    """
    found = []
    for name, seen in taps.attention.items():
        reference = floating_taps.attention[name]
        if not seen.rows or not reference.rows:
            continue
        for head, (float_sum, own, dead) in enumerate(zip(
                reference.entropy.tolist(), seen.entropy.tolist(), seen.dead.tolist())):
            found.append(dict(
                name=name, head=head, float_entropy=float_sum / reference.rows,
                entropy=own / seen.rows, dead=dead / seen.rows))
    return found
