"""Every prediction halved and doubled: a technique of one's own, which tests name in WANLAB_TECHNIQUES."""

from wanlab.techniques import Bound, Proof, Technique, register


class Halved:
    name = "halved"

    def begin(self):
        self.calls = 0

    def __call__(self, call, inner):
        self.calls += 1
        return 2 * (inner(call) / 2)


class HalvedTechnique(Technique):
    name, does, tier = "halved", "halves and doubles every prediction", "exact"
    order, order_reason = 50, "it stands outside of all others"

    def bound(self, shares):
        return Bound(0.0, "it saves nothing")

    def apply(self, place):
        self.rule = Halved()
        place.add(self.rule)

    def proof(self, place):
        calls = len(place.calls)
        return Proof(self.rule.calls == calls, f"halved {self.rule.calls} of {calls} calls.")


register(HalvedTechnique)
