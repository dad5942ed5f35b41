"""What is wrong with a tensor of somebody else's GPT-2, in words."""

from collections.abc import Iterable
from dataclasses import dataclass

from picogpt.noise import HALVES
from picogpt.replay import NORMS, Mistake, hook_of, in_block


@dataclass
class Finding:
    """What is wrong with a tensor, and why.

    tensor    its name, with * for the layer where there are several
    layers    those that have it; none if it has nothing to do with layers
    every     whether no other layer speaks against it
    mistakes  one, or two made together, or none if none is known that fits
    also      others that fit as well, the closest first
    error     how far off, as a multiple of the noise band, where it is worst
    after     what was recorded before it, and is right
    """

    tensor: str
    layers: tuple[int, ...]
    every: bool
    mistakes: tuple[Mistake, ...]
    also: tuple[tuple[Mistake, ...], ...]
    error: float
    after: str

    def say(self) -> str:
        """Return it in one or two plain sentences."""
        if not self.mistakes:
            where = self._where(self.tensor)
            return f"no known mistake fits your {self.tensor}{where}: look at what happens after {self.after}"
        right = "; ".join(f"GPT-2: {mistake.right}; yours: {mistake.wrong}" for mistake in self.mistakes)
        also = "; ".join(f"your {self._says(mistakes)}" for mistakes in self.also)
        half = {mistake.name.partition("_")[0] for mistake in self.mistakes} & {*HALVES}
        meant = "".join(f". If that is meant: compare --dtype {dtype}" for dtype in half)
        said = f"your {self._says(self.mistakes)}{self._where(self._site(self.mistakes[-1]))} ({right}){meant}"
        return said + f". Also possible: {also}" * bool(also)

    def _says(self, mistakes: Iterable[Mistake]) -> str:
        return " and your ".join(f"{self._site(mistake)} {mistake.says}" for mistake in mistakes)

    def _site(self, mistake: Mistake) -> str:
        """A mistake that was made before the tensor is said of the tensor where it was made."""
        hook = hook_of(self.tensor)
        layer = "*" if self.every or len(self.layers) != 1 else self.layers[0]
        site = hook if hook in mistake.sites else mistake.sites[0]
        return f"{self.tensor.removesuffix(hook) or f'blocks.{layer}.'}{site}" if in_block(site) else site

    def _where(self, site: str) -> str:
        if not self.layers:
            return ""
        if not self.every:
            return f", in layer{'s' * (len(self.layers) > 1)} {', '.join(map(str, self.layers))} only"
        if not in_block(hook_of(site)):
            return ", as everywhere else"
        norms = {site.split(".")[0] for mistake in self.mistakes for site in mistake.sites}
        others = norms - {hook_of(site).split(".")[0]} if norms <= NORMS.keys() else ()
        return ", in every layer" + f", and in {' and '.join(sorted(others))}" * bool(others)
