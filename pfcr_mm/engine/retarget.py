"""Views that a classifier takes for other classes: more classes than calibration images have."""
import torch
import torch.nn.functional as F

STEP = 0.024  # of the view's deviation, that each pixel moves by in a step
STEPS = 12  # at most; three or four are usual
WANTED = 0.3, 0.95  # probability of the other class, least and most: where a view stops


def retarget(inputs, logits, generator):
    """Move a view, hardly visibly, until a model takes it for a class drawn at random.

    A few hundred images show a few of many classes, and a quantized network is reconstructed
    for these: late layers have class tokens that each learned class owns. Pixels that move by
    the sign of a gradient (FGSM, arXiv 1412.6572) leave early layers what they know, and give
    late ones a class that no image shows, with the float model's own answer to it.

    Args:
        inputs (Tensor): (1, 3, H, W), normalised.
        logits (Callable): gives (1, classes) for such a view, in float.
        generator (torch.Generator): draws the class and its probability, on the CPU.

    Returns:
        Tensor: like `inputs`, within the extremes of each channel.
    """
    low, high = inputs.amin((2, 3), keepdim=True), inputs.amax((2, 3), keepdim=True)
    step, moved = STEP * inputs.std(), inputs
    drawn = torch.rand(2, generator=generator).tolist()
    wanted = WANTED[0] + (WANTED[1] - WANTED[0]) * drawn[1]
    with torch.enable_grad():
        for _ in range(STEPS):
            moved = moved.detach().requires_grad_()
            scores = logits(moved)
            target = scores.new_tensor([int(drawn[0] * scores.shape[1])], dtype=torch.long)
            loss = F.cross_entropy(scores, target)
            if loss.neg().exp() >= wanted:
                break
            gradient, = torch.autograd.grad(loss, moved)
            moved = (moved.detach() - step * gradient.sign()).clamp(low, high)
    return moved.detach()
