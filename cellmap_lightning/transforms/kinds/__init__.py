"""Kinds of targets, one file per kind; see docs/targets.md.

Each kind defines its compact form, its finished form, and the halo that it reads around the patch. Presence is
transferred as bits (see `targets`), ids in the signed type one size above the widest stored one, so that -1 means
unknown without a conflict with an id (negative ids are refused).
"""
