"""Write many replies on an accelerator: paged keys and values, one step for all, CUDA graphs."""
