"""Every exception of dcache. Each says what happened, with the values, and then what to do."""


class DCacheError(Exception):
    """Base of everything dcache raises on purpose."""


class UsageError(DCacheError):
    """Something cannot be done as asked: a name, a knob, a length, a file. The CLI prints it and exits with 2."""


class ModelError(UsageError):
    """A checkpoint cannot be loaded: folder, config field, tensor or tokenizer; the message names which."""


class MemoryLimitError(UsageError):
    """The device has too little memory for a batch: the message says what it needs and what would fit."""


class PluginError(DCacheError):
    """An installed plugin cannot be registered: a duplicate name, a wrong hook signature, a class of the wrong kind."""


class PolicyError(DCacheError):
    """A cache policy broke the contract: the message names policy, distribution and step, then expected and found."""


class UnmaskerError(DCacheError):
    """An unmasker broke the contract, for instance by committing a row outside its own window."""


class NumericsError(DCacheError):
    """The model produced NaN or Inf: the message names the step and the first layer that did."""


class WorkerError(DCacheError):
    """Workers of a launcher were lost again and again: the message names what they were doing, and the last reason."""
