"""Which config a result belongs to."""
import hashlib
import json

from ..models import QuantConfig

# What says where and how a run is made, and not what is run.
_CIRCUMSTANCES = ('work_dir', 'launcher', 'resume', 'trust_checkpoint', 'log_level',
                  'log_processor', 'visualizer', 'vis_backends', 'quantize_hooks',
                  'default_hooks', 'method', 'method_file')
_OF_THE_LOOP = ('cache_memory_mb', 'cache_dir', 'calibration_dir')


def fingerprint(cfg):
    """Sixteen hex digits that change with every key of a config that may change the result.

    Args:
        cfg (Config): whole, as the runner gets it; the seed is one of its keys.
    """
    content = {k: v for k, v in cfg.to_dict().items() if k not in _CIRCUMSTANCES}
    content['model'] = with_quant_defaults(content.get('model'))
    if content.get('quantize_cfg'):
        content['quantize_cfg'] = {k: v for k, v in content['quantize_cfg'].items()
                                   if k not in _OF_THE_LOOP}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_quant_defaults(model):
    """A model's config with what its `quant` leaves to the code, which may change with versions.

    Args:
        model (dict | None): of a config; None where it has none.
    """
    if not isinstance(model, dict) or not isinstance(model.get('quant'), dict):
        return model
    return {**model, 'quant': QuantConfig.from_dict(model['quant']).as_dict()}
