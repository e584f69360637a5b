"""Half of the patches of an image leave after the second layer of an encoder; the class token stays."""

import tiny_encoders
from reattend.hooks import Merge, Passing, Plan, attach, sites
from reattend.interventions.families.merging import Regroup


def use() -> None:
    model, inputs = tiny_encoders.vit(), {"pixel_values": tiny_encoders.pixels()}

    def reduce(passing: Passing) -> Regroup:
        size = passing.hidden.norm(dim=-1).masked_fill(passing.tokens.roles["cls"], float("inf"))
        return Regroup.keep(size.topk(9, dim=1).indices, passing.hidden.shape[1])

    with attach(model, [Plan("half", [Merge(sites(model).only([1]), reduce)])]) as session:
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [17, 17, 9, 9, 9] and session.applied == 1
    # with restore=True the states of all layers have all tokens
    with attach(model, [Plan("half", [Merge(sites(model).only([1]), reduce, restore=True)])]):
        assert model(**inputs, output_hidden_states=True).hidden_states[-1].shape[1] == 17
