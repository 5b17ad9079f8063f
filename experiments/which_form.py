"""How many rounds, how wide a port, how many groups, at equal parameters?

The hidden layer changes its size to keep the number of parameters. Rounds cost FLOPs but no
parameters.

    python -m experiments.run which_form
"""

from experiments.setting import COMMON, LARGER_SHARE, SHARE
from experiments.study import Study
from experiments.sweeps import seeds, vary

STUDY = Study(
    sweep=vary("model.rounds", (1, 2, 4))
    * vary("model.groups", (4, 8, 16))
    * vary("model.p_inter", (1, 2), "port")
    * seeds(3),
    common={**COMMON, "model.match": SHARE, "model.match_by": "hidden", "rate": 1e-2},
    larger=LARGER_SHARE,
    baseline={"rounds": "rounds = 2", "port": "port = 2", "groups": "groups = 8"},
)
