"""Lookups: from a query to the k experts whose keys have the largest inner products with it. Each module is one.

`LOOKUPS[name]` is the module that `--config.router.lookup` names; a new file here is a new lookup. Each one has

    QUERY_PARTS: int                      parts of a query, each of unit length, with keys of its own
    ALWAYS_FINDS_THE_SAME: bool           whether a trained selection is always found again; if not, it can serve only
    check(num_experts, key_dim)           raises UserError if it does not support this number of experts or key width
    spec(num_experts, key_dim)            (jax.ShapeDtypeStruct, names of its axes): what `init` returns
    init(seed, num_experts, key_dim)      random keys, a function of the seed, made on the devices that keep them
    save(keys, num_experts)               what a file keeps of them: a hash, as JSON
    restore(seed, num_experts, key_dim, saved)      makes them again; raises UserError if they are not those of `save`
    find(keys, query_BC, k, num_keys)     expert_ids_BK and scores_BK, the best first; the same on any mesh
    reference(keys, query_BC, k, num_keys)          the plain version of `find` that it is tested against

Scores are inner products, summed in float32. Among equal scores the lowest id is preferred, so that the answer depends
on the scores alone, wherever ALWAYS_FINDS_THE_SAME. `find` refuses a query with a NaN or an infinity in it: its ids are
`num_keys`, which no expert has (a gather gives zeros for it), and its scores are NaN. Keys are taken to be finite.
"""

from lamini_jax.runtime.registry import Registry

LOOKUPS = Registry("lamini_jax.index", "router.lookup")
