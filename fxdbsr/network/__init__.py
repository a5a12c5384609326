"""A converted model on a CPU as one run of compiled steps: which operations, which layouts, which memory."""
