"""Models of other code bases, for ``loader: dyvte.loaders.NAME:load``: built by the packages that the user has.

A loader takes a :class:`dyvte.config.ModelConfig` and returns what tracing and evaluation need to know::

    model        an ``nn.Module`` with ``forward`` and ``generate``, in evaluation mode
    processor    what :func:`dyvte.data.encode` takes: prompts and images in, inputs of the model out
    visual_mask  where the visual tokens are, as in :func:`dyvte.attach`
    decoder      which module holds the decoder layers, as in :func:`dyvte.attach`

One for a code base that is not here is a function of these few lines, see docs/loaders.md.
"""
