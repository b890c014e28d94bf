"""One logger for the engine; silent unless the embedding program configures logging."""

import logging

logger = logging.getLogger("caduceus")
logger.addHandler(logging.NullHandler())
