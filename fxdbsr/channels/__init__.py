"""Which channels of a traced model matter: `Flow` follows constants forward and readers backward.

`values` says what is known of a value, `rules`, `layout` and `sizes` what each operation does to it, `layers` what
convs, linear layers and norms read, `edits` how operations change when channels leave.
"""
