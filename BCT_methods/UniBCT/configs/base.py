"""UniBCT's own keys; configs/base.py and old_model/keys.py explain the others."""

from easydict import EasyDict as edict

from old_model.keys import keys

config = edict(keys)

config.network = "r50"
config.decay_epoch = [20, 26, 32]   # epochs at which lr drops ×0.1; the other methods decay polynomially
config.scale = 1.0                  # factor on f·P, the unit new features times the prototypes
config.normalize_prototypes = False # False: raw class means, as in the published code, so that their norm acts as the
                                    # scale; True: unit length, as in BCT, whose pull at scale 1 is weak
config.compat_start_epoch = 10      # first epoch of the prototype term, counted from 0
config.refine_epochs = [10, 20]     # epochs that begin with new prototypes; before the first: plain class means
config.temperature = 0.05           # τ, divides the cosines of new features: the lower, the more the nearest count
config.damping = 0.9                # λ in [0, 1): share contributed by the neighbours; 0 = plain class means
