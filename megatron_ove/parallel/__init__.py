"""Everything that knows about ranks: topology, collectives, stateless randomness, and the CPU backend.

Groups are arguments everywhere; only `topology` knows megatron-core's `parallel_state`.
"""
