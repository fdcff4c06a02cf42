"""PFCR with POS and what others have found to help: curvature-weighted and global losses."""
method = 'PFCR plus'
quantize_cfg = dict(
    reconstruction=dict(
        loss=dict(
            _delete_=True, type='mixed',
            terms=[dict(type='channel_mse', weight=2.0), dict(type='aph'), dict(type='final')])),
    head_reconstruction=dict(loss='channel_mse'))
