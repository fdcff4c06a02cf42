"""Which metrics of an evaluator count, and how they are called."""

# Families: of each result the first one that it has is reported. Values are from 0 to 1.
FAMILIES = (dict(bbox_mAP='box AP', segm_mAP='mask AP'), dict(top1='top-1', top5='top-5'))
# What `AgreementHook` adds: nats, and a share from 0 to 1.
AGREEMENT = dict(kl='divergence', same='same class')
NAMES = tuple(name for family in FAMILIES for name in family)


def counted(result, names=NAMES):
    """The metrics that count, without the evaluator's prefix.

    Args:
        result (dict): of an evaluator, such as {'coco/bbox_mAP': 0.4, ...}.
        names (Sequence[str]): which count.
    """
    plain = {key.rpartition('/')[2]: value for key, value in result.items()}
    return {key: value for key, value in plain.items() if key in names}


def titles(*results):
    """Names and titles of the family that the results belong to.

    Args:
        *results (dict | None): from `counted`.

    Returns:
        dict[str, str]: title by name; of detectors where nothing was measured.
    """
    for family in FAMILIES:
        if any(name in (result or {}) for result in results for name in family):
            return family
    return FAMILIES[0]


def agreements(report):
    """How near each state is to the float model, where `AgreementHook` measured it.

    Args:
        report (dict): contents of report.json.

    Returns:
        dict[str, dict]: by state 'kl' and 'same'; empty for a run without the hook.
    """
    found = {state: counted(metrics or {}, AGREEMENT)
             for state, metrics in (report.get('metrics') or {}).items()}
    return {state: values for state, values in found.items() if values}
