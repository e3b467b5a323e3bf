"""The suite every kernel must pass, ours and other people's.

    pytest --pyargs gptq_loader_plugin.conformance --kernel NAME

Each cell of bits x group size x act-order x symmetry x shape is either accepted, and then the
product is right to the kernel's dtype, or declined with a reason, and then skipped with it.
"""
