"""Bytes between devices: `python -m ngc_jax.collectives --config=defaults --mesh=group:4`.

For: what the update of a config, compiled for devices that need not be there, sends for each token;
beside it the dense model of the same sizes under tensor parallelism. Not for: the counting
(`training/traffic.py`).
"""

import math

from absl import flags

from ngc_jax.commands.arguments import command, read_mesh
from ngc_jax.commands.config_flag import read_config
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.output import doing, now


def main() -> None:
    """Prints the table that the command line asks for."""
    own = flags.FlagValues()
    flags.DEFINE_string("mesh", "group:4", "Axes and their sizes: fsdp:2,group:4.", flag_values=own)
    flags.DEFINE_integer("dense_width", 0, "Of the dense model; 0 = the same.", flag_values=own)
    config, _ = read_config(__doc__ or "", own)
    # Only now: --help and a mistake need not wait for these.
    import jax

    from ngc_jax.config import validate
    from ngc_jax.nn import mesh as meshes
    from ngc_jax.training import match_size, traffic

    sizes = read_mesh(own.mesh)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))
    config = config.copy_and_resolve_references()
    config.mesh.update(sizes)
    now("checking the config" if not config.model.match else "matching sizes")
    match_size.prepare(config)
    dense = traffic.dense_of(config, own.dense_width)
    try:
        validate(dense)
    except UserError as error:
        raise UserError(f"the dense model to compare with: {error}") from error
    with doing("compiling"):
        made = [traffic.costs(model, meshes.make_mesh(model.mesh)) for model in (config, dense)]
    print(traffic.table(*made))


if __name__ == "__main__":
    command(main)
