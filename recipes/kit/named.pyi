# Written by `python benchmarks/stubs.py`: what the recipes' fields say, for editors and type checkers. Nothing here runs.

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

from ...hooks import Session
from ..act import ACT
from ..attencraft import AttenCraft
from ..attend_and_excite import AttendAndExcite
from ..attentive_eraser import AttentiveEraser
from ..block_topk import BlockTopK
from ..cmai import CMAI
from ..csg import CSG
from ..emphasise import Emphasise
from ..entropy_scaling import EntropyScaling
from ..evit import EViT
from ..gift import GIFT
from ..headhunter import HeadHunter
from ..instaboost import InstABoost
from ..nag import NAG
from ..opera import OPERA
from ..pag import PAG
from ..pai import PAI
from ..pine import Pine
from ..primecomposer import PrimeComposer
from ..prompt_reweight import PromptReweight
from ..regional import Regional
from ..retrieval_heads import RetrievalHeads
from ..seg import SEG
from ..seka import SEKA
from ..selective_emphasis import SelectiveEmphasis
from ..soft_injection import SoftInjection
from ..softpag import SoftPAG
from ..spa import SPA
from ..spotlight import Spotlight
from ..streaming import Streaming
from ..tpg import TPG
from ..var import VAR
from ..vhr import VHR
from ..visual_token_exit import VisualTokenExit
from ..vsf import VSF
from .apply import Choice
from .base import Recipe

class ACTParameters(TypedDict, total=False):
    """Takes weight from meaningless tokens that attract attention inside the prompt and gives it to the others."""

    beta: float
    """factor on the weight of hidden sinks; 1 changes nothing, 0 removes it"""
    threshold: float
    """a column is a sink if the mean weight of the rows that see it exceeds this"""
    threshold_alpha: float | None
    """the paper's rule instead: the threshold is this number over the prompt's length; 5 in the paper"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | str | None | Mapping[int, Sequence[int]]
    """heads to calibrate: [[layer, head], ...], {layer: [heads]}, a published list's name, or 'all'"""
    profile_path: str | None
    """file with the heads that a profiling run selected, instead of heads; 'cached' = the one kept for this model"""
    official_exempt: bool
    """spare the first column over the threshold, as the official code does, instead of the first token"""
    min_rows: int
    """rows that must see a column before it can be a sink; 4 to 8 spares the prompt's last tokens"""

class AttenCraftParameters(TypedDict, total=False):
    """Reads from one pass of the denoiser where each thing of the prompt is in a picture, as masks."""

    words: Sequence[str] | Sequence[Sequence[str]] | None
    """the things, as words or passages of every prompt, or a list of them per prompt; of a passage the token that shows
    most at a place counts there"""
    columns: Sequence[Sequence[int]] | None
    """instead of words: for every thing its columns in the text that the denoiser gets (0 is the start token), the same
    for all prompts; for prompts that were encoded elsewhere"""
    occurrence: int | Literal["all"]
    """which occurrence of a word that occurs more than once, from 0, -1 = the last"""
    image: Any
    """the picture that is looked at, a path or a PIL picture (or a list of one for each prompt); the prompt says what it
    shows. Default: the picture that the run draws, at its first step with as little noise as `timestep` says, or its
    last one"""
    timestep: int
    """how much noise the picture has, from 0 (none) to 999 (noise alone); with `image` a step of the run must be near it:
    let the run have twenty steps"""
    seed: int
    """of the noise that is put on `image`"""
    threshold: float
    """by how much a place's map must lead all others, for the place to be in the mask"""
    sharpen: int
    """the power that maps of words are raised to"""
    spread: int
    """how often maps are spread over what belongs together; 0 = not"""
    cross_resolution: int | None
    """places along the shorter side of the maps of words; default: a quarter of the latents"""
    self_resolution: int | None
    """the same of the maps of what belongs together, and of the masks; default: half of the latents"""

class AttendAndExciteParameters(TypedDict, total=False):
    """Moves a picture, before each early step, until every chosen word of the prompt has a place that attends to it."""

    scale: float
    """how far the latents go down the gradient at the first step; 0 = not"""
    steps: int
    """how many of the first steps are changed; the default is half of the authors' 50"""
    resolution: int | None
    """places along the shorter side of the maps that are read; default: a quarter of the latents (16 for 512 pixels), for
    small pictures, where that is fewer than 8, half of them or all"""
    words: Sequence[str] | Sequence[Sequence[str]] | None
    """the words that must show: a list of those of every prompt, or a list of such lists, one per prompt"""
    columns: Sequence[Sequence[int]] | None
    """instead of words, the tokens that must show, each by itself: their columns in the text that the denoiser gets, a
    list per prompt or one for all. Neither 0, the start token, nor the last one: they are compared with no word"""
    occurrence: int | Literal["all"]
    """which occurrence of a word that occurs more than once, from 0, -1 = the last, or 'all' of them"""
    each: bool
    """every token of a word must show by itself, instead of their mean"""
    thresholds: Mapping[int, float]
    """{step: how much the least attended word must have}: there the change is repeated until it has"""
    tries: int
    """how often a change is repeated at most"""
    smooth: bool
    """smooth the maps before their largest value is taken"""
    sigma: float
    """width of the smoothing"""
    normalize_eot: bool
    """compare a word with the other words of the prompt alone, without the end token and the padding (SD 2.1)"""
    length: int | None
    """with columns and normalize_eot: tokens of the prompt, with start and end"""

class AttentiveEraserParameters(TypedDict, total=False):
    """Takes a masked thing out of a picture and goes on with what is around it, instead of drawing another thing there."""

    scale: float
    """how far the prediction goes to, and beyond, the one that does not see the thing; 0 = not, 1 = there"""
    rescale: float
    """how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring
    pictures; 0 = not (a pipeline's own guidance_rescale does the same)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none"""
    layers: Sequence[int] | None
    """layers that are redirected, numbered over all self-attention of the denoiser (UNet: down, mid, up); default: a
    UNet's up blocks, the second half of other models"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None
    """single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"""
    mask: Any
    """what is to go: the path of a picture that is not black there (a tenth of its brightest pixel and less counts as
    black), a PIL picture, or rows of numbers; one for all pictures, or a list of one for each prompt"""
    boxes: (
        tuple[float, float, float, float]
        | Sequence[Any]
        | Sequence[tuple[float, float, float, float] | Sequence[Any]]
        | Sequence[Sequence[tuple[float, float, float, float] | Sequence[Any]]]
        | None
    )
    """instead of a mask: a box [left, top, right, bottom] in shares of the picture's sides, or several; of all pictures,
    or a list for each prompt"""
    image: Any
    """the picture that the thing is taken out of, a path or a PIL picture (or a list of one for each prompt): all outside
    the mask is kept as it is there. Without it that is left to the pipeline, which inpainting ones do"""
    invert: bool
    """begin with the noise that leads to `image` (one more pass of the denoiser for each step), instead of the pipeline's
    own; then call a text-to-image pipeline"""
    factor: float
    """scores of tokens in the mask are multiplied by this at the first steps, so that they read more broadly; 1 = not"""
    steps: int
    """how many of the first steps have that"""
    grow: float
    """the mask is made larger by this much to every side, in shares of the picture's shorter side (the authors: 0.004 to
    0.015)"""

class BlockTopKParameters(TypedDict, total=False):
    """Each written token reads only the best blocks of a long context, its first tokens and the recent ones."""

    block_size: int
    """tokens per block"""
    dense_layers: Sequence[int]
    """layers that read everything, counted from 0"""
    blocks: int
    """how many blocks each step reads besides the first and the recent tokens"""
    local: int
    """how many recent tokens are read, the current one included"""
    sinks: int
    """how many first tokens are read"""

class CMAIParameters(TypedDict, total=False):
    """Blocks the image tokens that a text token's context does not look at. A reconstruction from the paper's abstract."""

    first_layer: int
    """first decoder layer that is changed"""
    last_layer: int | None
    """last decoder layer that is changed; None = the model's last, -2 = the one before"""
    gamma: float
    """share of a row's image tokens that are blocked; 0 changes nothing"""
    lag: Literal[0, 1]
    """1: the focus comes from the layer before; 0: from the layer's own plain weights"""

class CSGParameters(TypedDict, total=False):
    """Draws each word of the prompt in the box that it was given."""

    scale: float
    """how far the latents go down the gradient at the first step; 0 = not"""
    steps: int
    """how many of the first steps are changed; the default is half of the authors' 50"""
    resolution: int | None
    """places along the shorter side of the maps that are read; default: a quarter of the latents (16 for 512 pixels), for
    small pictures, where that is fewer than 8, half of them or all"""
    boxes: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
    """the box of each word of the prompt, [left, top, right, bottom] in shares of the picture, or its mask: {'red circle':
    [0.1, 0.2, 0.5, 0.6]}; several prompts may have one such mapping each"""
    background: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
    """the same for words of what is behind the others: they get what the boxes of these leave of their own"""
    columns: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None
    """where each of these words stands in the text that the denoiser gets, as columns from 0, for prompts that were
    encoded elsewhere; default: they are looked for in the prompt"""
    occurrence: int | Literal["all"]
    """which occurrence of a word that occurs more than once, from 0, -1 = the last, or 'all' of them"""
    tries: int
    """how many moves there are before each of these steps"""
    strength: float
    """how far weights are redistributed to the boxes; 0 = not"""
    conditional_only: bool
    """redistribute the weights of the prompt's rows alone, not of the negative prompt's"""
    topk: float
    """share of a box's places that the loss looks at, those with most attention"""
    dropout: float
    """share of these that are taken, at random"""
    margin: float
    """how much more attention a word must have in its box than any other word there"""
    seed: int
    """of the random places"""

class EmphasiseParameters(TypedDict, total=False):
    """Makes a language model read marked passages of its prompt (an instruction, a fact) more than the rest."""

    text: str | Sequence[str] | Sequence[Sequence[str]] | None
    """passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[Sequence[tuple[int, int] | Sequence[Any]]] | None
    """token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"""
    occurrence: int | None
    """which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[int] | None | Mapping[int, Sequence[int]]
    """{layer: [query heads]}, or a list of (layer, head) pairs, or a list of whole layers; None = all heads"""
    alpha: float | None
    """factor on the other prompt tokens' weights; 1 = no change, None = 0.01 with chosen heads, 0.3 on all heads"""
    position: Literal["exclude", "include", "generation"]
    """'exclude' multiplies the other prompt tokens by alpha, 'include' divides them by it (so alpha > 1 emphasises),
    'generation' multiplies the whole prompt, which weakens it against the generated text"""
    profile_path: str | None
    """file of a profile with head scores: that of `reattend profile emphasise MODEL`, or of recipe retrieval-heads;
    'cached' = the first of these, as it is kept for the model. Its best heads are steered"""
    top: int | None
    """how many of the profile's best heads; None = as it advises, or one in twenty"""
    keep_sink: bool
    """leave each prompt's first token as it is: models park attention there, and need it to stay fluent"""
    official_multi: bool
    """with several passages add the bias once per passage, as the official code does, instead of once"""
    official_span: bool
    """find passages by the official rule, which also takes the token that ends where a passage begins"""

class EntropyScalingParameters(TypedDict, total=False):
    """Keeps attention as spread as in training on smaller and larger canvases: fewer cut-off or repeated objects."""

    base: int | tuple[int, int] | Sequence[Any] | None
    """the size of the pictures that the model was trained on, in pixels: one side of a square, or [height, width];
    default: the size that the pipeline draws where nobody names one"""
    strength: float
    """exponent of the factor: 0 = none, 1 = as published"""
    layers: Sequence[int] | None
    """layers that are scaled, numbered over all self-attention of the denoiser (UNet: down, mid, up; Flux: double, then
    single blocks); default: all"""
    scope: Literal["all", "image"]
    """where text and image share a stream: 'all' counts all tokens and scales whole rows; 'image' counts image tokens and
    scales only what these see of each other, at up to twice the cost of attention"""

class EViTParameters(TypedDict, total=False):
    """An image encoder goes on with the patches that its class token looks at, and runs faster."""

    keep: float | Mapping[int, float]
    """part of the tokens that stays at each reduction, above 0, 1 = all; or {layer: part}, other layers keep all"""
    layers: Sequence[int] | None
    """layers that reduce, from 0; default: those after a quarter, a half and three quarters of the depth"""
    fuse: bool
    """the others become one token, their sum weighted by the class token's attention; False: they leave"""
    restore: bool
    """every layer gives all tokens back, for dense heads and for decoders that need all features of an image"""
    normalise: bool
    """these weights sum to 1, so that the fused token is a mean"""

class GIFTParameters(TypedDict, total=False):
    """Strengthens the places of an image that drew attention while the question was read, and the question with them."""

    alpha: float | None
    """strength: image weights grow by up to exp(alpha); 0 changes nothing, None = the model's published value, else 5"""
    saliency_layers: Sequence[int] | None
    """layers in which the question's gaze is read, from 0"""
    enhance_layers: Sequence[int] | None
    """layers whose weights are changed, from 0"""
    words: Literal["auto", "spacy", "content", "all"]
    """words of the question that are read: 'spacy' nouns, names, verbs, adjectives, adverbs and numbers; 'content' all but
    English function words; 'auto' the first where spaCy and en_core_web_sm are installed, else the second; 'all' every
    token"""
    question: str | Sequence[str] | None
    """the question as it stands in the prompt (or one per prompt); None = the user's last turn"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | None
    """token range [start, stop) of the question instead, from the first real token: one for all, or one per prompt"""
    beta: float
    """weight of the question's growth; 0 changes the image only"""
    head_share: float
    """share of heads that are read, and that are changed"""
    clip: float
    """standard deviations from the mean at which the saliency map is clipped"""
    profile_path: str | None
    """file with the layers that a profiling run chose; 'cached': the profile kept for this model"""

class HeadHunterParameters(TypedDict, total=False):
    """Pushes an image away from a copy whose attention was weakened in a few heads that were searched for your own objective."""

    scale: float
    """how far the image is pushed away from the weakened branch; 0 = not"""
    rescale: float
    """how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring
    pictures; 0 = not (a pipeline's own guidance_rescale does the same)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none"""
    layers: Sequence[int] | None
    """use only the heads that lie in these layers, numbered over all self-attention of the denoiser"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None
    """heads as [layer, head] pairs, best first, instead of a profile"""
    scope: Literal["image", "all", "masked"]
    """rows weakened where image and text share a stream: image tokens only, all tokens, or image tokens that still see the
    text ('masked'), as diffusers has it in its SD3 PAG pipeline"""
    strength: float
    """how far the chosen heads are weakened in the branch; 1 = PAG"""
    perturbation: Literal["identity", "uniform", "mean_query", "argmax", "temperature"]
    """what the maps are pulled towards: each token itself, all tokens evenly, the mean query's map, each row's strongest
    token, or a flatter softmax; scope 'masked' goes with 'identity' only"""
    temperature: float
    """softmax temperature of perturbation 'temperature'; 1 = none"""
    profile_path: str | Sequence[str] | None
    """file with the heads that a search found, or several files whose heads are joined; 'cached' = the one kept for this
    model, which is also what counts when neither heads nor a file are given"""
    top: int | None
    """how many heads of each profile, in the order in which they were found; None = all"""
    random_heads: bool
    """control: as many other heads, drawn at random, with the same strength"""
    seed: int
    """which random heads"""

class InstABoostParameters(TypedDict, total=False):
    """Multiplies a language model's attention on marked passages (an instruction) by one constant, in all heads."""

    text: str | Sequence[str] | Sequence[Sequence[str]] | None
    """passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[Sequence[tuple[int, int] | Sequence[Any]]] | None
    """token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"""
    occurrence: int | None
    """which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[int] | None | Mapping[int, Sequence[int]]
    """{layer: [query heads]}, or a list of (layer, head) pairs, or a list of whole layers; None = all heads"""
    multiplier: float
    """factor on the passages' weights; 1 changes nothing, the paper searches 1 to 19; long passages need less"""
    first_token: bool
    """boost each prompt's first token too, as the official code does, whose boosted range starts there"""

class NAGParameters(TypedDict, total=False):
    """Pushes an image away from a negative text inside attention: negative prompts for few-step models without CFG."""

    tensors: str | None
    """the negative text as tensors instead, for models without text encoders: a safetensors file with prompt_embeds
    [texts, tokens, width], with pooled_prompt_embeds where the model has them, and prompt_attention_mask [texts,
    tokens], 1 = a word, 0 = padding. Without that mask padding acts as words do (nag reads it as the model reads its
    prompt's)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none; the effect lies in the first ones"""
    negative: str | Sequence[str]
    """what the image is pushed away from: one text, or one per prompt; '' = away from the empty text, as the authors have
    it. The pipeline's own negative_prompt is not read"""
    scale: float | None
    """how far the push goes; 1 = off. Default: 3 for UNets, 9 for Wan, 5 for others"""
    limit: float
    """a pushed token is at most this many times as large as it was"""
    strength: float | None
    """share of the pushed output; 0 = off. Default: 0.5 for UNets, 0.125 for SD3, 0.25 for others"""
    norm: Literal["l1", "l2"]
    """how the size of a token is measured; 'l2' as in the first published file"""

class OPERAParameters(TypedDict, total=False):
    """Penalises next tokens that go on looking at one earlier token of the answer instead of the image."""

    candidates: int
    """how many of the likeliest next tokens are tried; all others are ruled out"""
    penalty_weight: float
    """weight of the penalty; 0 = only rule out"""
    scale: float
    """factor on the weights that are multiplied"""
    image_range: tuple[int, int] | Sequence[Any] | None
    """token range [start, stop) of the image, where it cannot be found by its token (prompts of embeddings)"""

class PAGParameters(TypedDict, total=False):
    """Pushes an image away from a copy in whose chosen layers each place saw only itself: clearer structure."""

    scale: float
    """how far the image is pushed away from the perturbed branch; 0 = not"""
    rescale: float
    """how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring
    pictures; 0 = not (a pipeline's own guidance_rescale does the same)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none"""
    layers: Sequence[int] | None
    """layers that are perturbed in all heads, numbered over all self-attention of the denoiser (UNet: down, mid, up; Flux:
    double, then single blocks); default: a UNet's mid block (for small pictures, where that sees fewer than 8 x 8
    places, the last layer of the first block after it that sees as many), layer 9 of SD3-medium, the middle layer of
    other models"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None
    """single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"""
    scope: Literal["image", "all", "masked"]
    """rows weakened where image and text share a stream: image tokens that still see the text, as diffusers' SD3 PAG
    pipeline has it ('masked'), image tokens that see themselves alone ('image'), or all tokens alone ('all')"""
    adaptive: float
    """how much the scale falls with each of the 1000 timesteps of training that are over: 0.003 takes a scale of 3 to 0 at
    the end, 0.006 half way; 0 = it stays"""

class PAIParameters(TypedDict, total=False):
    """Strengthens all image tokens while an answer is written, and favours words that the image makes likelier."""

    first_layer: int
    """first decoder layer that is changed"""
    last_layer: int | None
    """last decoder layer that is changed; None = the model's last, -2 = the one before"""
    alpha: float
    """growth of the image's scores; 0 = none, sensible up to 0.6"""
    gamma: float
    """weight of what the image adds to the logits; 1 = no second branch, at half the cost per token"""
    cutoff: float
    """tokens below this share of the likeliest one's probability are left out (gamma other than 1)"""

class PineParameters(TypedDict, total=False):
    """Makes answers independent of the order in which documents or options stand in the prompt."""

    segments: Sequence[str] | Sequence[Sequence[str]] | None
    """the segments exactly as in the prompt, in any order: for every prompt, or a list of them per prompt"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[Sequence[tuple[int, int] | Sequence[Any]]] | None
    """token ranges [start, stop) of the segments instead, from the first real token: for every prompt, or per prompt"""
    order: Literal["importance", "reverse", "prompt"]
    """'importance' puts what matters most to a query nearest to it, 'reverse' farthest (worse), 'prompt' leaves segments
    where they stand (they still see each other; the order then matters)"""

class PrimeComposerParameters(TypedDict, total=False):
    """Puts a thing from one picture into another one and draws it so that it fits there."""

    background: Any
    """the picture that the thing is put into, a path or a PIL picture, or a list of one for each prompt"""
    reference: Any
    """a picture that shows the thing, likewise"""
    mask: Any
    """where the thing is in `reference`: the path of a picture that is not black there (a tenth of its brightest pixel and
    less counts as black), a PIL picture, or rows of numbers, or a list of one for each prompt; default: the whole
    picture is the thing"""
    box: tuple[float, float, float, float] | Sequence[Any] | Sequence[tuple[float, float, float, float] | Sequence[Any]]
    """where it goes: [left, top, right, bottom] in shares of the background's sides, or a list of one for each prompt; it
    is scaled to fill the box as far as its proportions allow"""
    words: Sequence[str] | Sequence[Sequence[str]] | None
    """the words of the prompt that mean the thing, of every prompt or a list of them per prompt: only the thing attends to
    them"""
    columns: Sequence[Sequence[int]] | None
    """instead of words: columns of the text that the denoiser gets (0 is the start token), a list per prompt or one for
    all; for prompts that were encoded elsewhere"""
    occurrence: int | Literal["all"]
    """which occurrence of a word that occurs more than once, from 0, -1 = the last"""
    same_domain: bool
    """both pictures are of one kind, as two photographs are: the run begins with the thing pasted into the background.
    False for a thing that is to be drawn in another style, as in a painting or a sketch"""
    scores_until: float
    """the fraction of the steps from which on the picture attends by itself"""
    background_until: float
    """the fraction of the steps up to which the background is kept as it is; 1 = to the end"""
    object_until: float
    """the fraction of the steps up to which the thing is kept as it is"""
    centred: bool
    """the thing is in the middle of its own picture, as published; False: there where it goes"""

class PromptReweightParameters(TypedDict, total=False):
    """Multiplies the attention that a picture gives to chosen words of the prompt, or edits a picture by its prompt."""

    words: str | Sequence[str] | Sequence[Sequence[str]] | Mapping[str, float] | Sequence[Mapping[str, float]] | None
    """the words: one, several of every prompt, or a list of them per prompt; with factors of their own as {'red': 1.4} or
    as the whole prompt 'a (red:1.4) circle' (the pipeline gets reattend.recipes.plain_prompt of it)"""
    columns: Sequence[tuple[Sequence[int], float] | Sequence[Any]] | None
    """instead of words, of every prompt: columns of the text that the denoiser gets, from 0, and their factor; for prompts
    that were encoded elsewhere"""
    factor: float
    """factor on the weights of words that have none of their own; 1 = no change"""
    occurrence: int | Literal["all"]
    """which occurrence of a word that occurs more than once, from 0, -1 = the last, or 'all' of them"""
    start: float
    """first part of the schedule that is changed, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on nothing is changed"""
    layers: Sequence[int] | None
    """layers that are changed, numbered over all attention to the text (UNet: down, mid, up); default: all of them"""
    renormalise: bool
    """scale each row back to its old sum, so that other words give what these gain"""
    edit: Literal["replace", "refine"] | None
    """draw the prompts after the first with the attention of the first one: 'replace', words swapped one for one (a cat /
    a dog), or 'refine', words added (a cat / a fluffy cat); give the pipeline both prompts, the same noise, and words
    only to reweight too, of each prompt its own: [{}, {'dog': 2.0}]"""
    source: Literal["batch", "run"]
    """with edit: the attention is that of the first prompt of the batch, or of the session's first run"""
    pictures: int
    """with edit: how many pictures each prompt has (num_images_per_prompt)"""
    self_start: float
    """with edit: the first part of the schedule, for self-attention"""
    self_stop: float
    """with edit: the fraction of the steps from which on self-attention is no longer taken; 0 = never"""
    self_places: int
    """with edit: self-attention is taken where it sees at most so many places; joint models have no such limit"""
    aligned: bool
    """with edit 'replace': words after a swapped one that has more tokens, or fewer, take their own attention, and not
    that of the place at which they stand"""

class RegionalParameters(TypedDict, total=False):
    """Gives regions of the picture texts of their own: each thing in its box, with its own colours."""

    tensors: str | None
    """the same texts as tensors, for models without text encoders: a safetensors file with prompt_embeds [texts, tokens,
    width] in the order of the texts, and pooled_prompt_embeds and prompt_attention_mask where the model has them"""
    start: float
    """first part of the schedule it acts in, as a fraction of the steps"""
    stop: float | None
    """the fraction of the steps from which on the prompt alone is read: regions late in the schedule leave seams. Default:
    1 for models with cross-attention, 0.4 for others"""
    regions: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
    """the text of each region and its box, [left, top, right, bottom] in shares of the picture, or its mask: {'a red
    circle': [0, 0, 0.5, 1]}; several prompts may have one such mapping each. What no region holds is drawn by the
    prompt. Regions may overlap; a text is cut where the pipeline cuts its prompt"""
    base_ratio: float | None
    """how much the whole prompt is read beside a region's text; 0 = not, 1 = the prompt alone. Default: 0 for models with
    cross-attention, 0.3 for others"""
    double_interval: int
    """every so many blocks that keep text and image apart, regions are hidden from each other; 1 = all"""
    single_interval: int
    """the same for blocks in which text and image are one stream"""
    padding: bool
    """read also what pads the texts to the pipeline's length, where the model reads those of its prompt; False = words
    alone, which costs less"""

class RetrievalHeadsParameters(TypedDict, total=False):
    """Masks or strengthens the few heads that copy facts from the context into the answer."""

    mode: Literal["mask", "zero", "sharpen", "sink_down", "gain"]
    """mask: attend evenly to all keys; zero: no output; sharpen: larger scores; sink_down: less weight on the first token;
    gain: larger output"""
    strength: float | None
    """how much; 0 = nothing; None = 1 to mask or zero (completely), 0.2 otherwise"""
    top: int
    """how many of the profile's best heads"""
    min_score: float
    """and only those with at least this score: the share of a sentence that a head copied"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None | Mapping[int, Sequence[int]]
    """heads instead of a profile: [[layer, head], ...] or {layer: [heads]}, all treated with the full strength"""
    profile_path: str | None
    """file with the head scores of a profiling run, or .json as the official repository has them; 'cached' = the profile
    kept for this model, which is also what counts when neither heads nor a file are given"""
    where: Literal["auto", "decode", "last_row", "all"]
    """decode: rows of generated tokens; last_row: the prompt's last row too, which chooses the first new token; all: every
    row; auto: decode to mask or zero, all otherwise"""
    random_heads: bool
    """control: as many heads drawn outside the best 100, with the same strengths"""
    seed: int
    """which random heads"""

class SEGParameters(TypedDict, total=False):
    """Pushes an image away from a copy whose attention was blurred over the image: clearer structure, few side effects."""

    scale: float
    """how far the image is pushed away from the perturbed branch; 0 = not"""
    rescale: float
    """how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring
    pictures; 0 = not (a pipeline's own guidance_rescale does the same)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none"""
    layers: Sequence[int] | None
    """layers that are perturbed in all heads, numbered over all self-attention of the denoiser (UNet: down, mid, up; Flux:
    double, then single blocks); default: a UNet's mid block (for small pictures, where that sees fewer than 8 x 8
    places, the last layer of the first block after it that sees as many), layer 9 of SD3-medium, the middle layer of
    other models"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None
    """single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"""
    sigma: float
    """width of the blur in places of the image as a layer sees it; 0 = none, above 9999 all places share one query"""

class SEKAParameters(TypedDict, total=False):
    """Stretches the keys of marked passages of the prompt along directions that questions make relevant."""

    text: str | Sequence[str] | Sequence[Sequence[str]] | None
    """passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[Sequence[tuple[int, int] | Sequence[Any]]] | None
    """token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"""
    occurrence: int | None
    """which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"""
    gain: float | None
    """g+: how far keys are stretched along the relevant directions; 0 = not, below 0 shrinks, None = 0.8, adaptive 1"""
    negative_gain: float | None
    """g-: the same away from what a wrong question makes relevant; both are then halved, as in the official code. None =
    without, and g+ at its full size; not used when adaptive"""
    layers: str | Sequence[int]
    """layers to steer: all, first10, last10 (any number), or their numbers"""
    top_pct: float
    """share of the singular values' sum that the leading directions hold; more = more directions"""
    min_diff: float
    """key heads whose keys a question moves less than this are left alone; see distance"""
    distance: Literal["code", "paper"]
    """how far keys move: the mean norm over tokens (paper), or the official code's norm over all tokens divided by their
    number, which shrinks with the number of examples"""
    feature: Literal["tanh", "elu"] | None
    """stretch a function of the keys instead and invert it; the profile must be made with the same one"""
    adaptive: bool
    """AdaSEKA: mix the subspaces of several kinds of questions by the prompt's last token"""
    top_k: int | None
    """adaptive: leading directions of each expert; None = all"""
    rule: Literal["weighted_top_k", "all_weighted", "top_k_uniform"]
    """adaptive: how the query weighs an expert's directions"""
    profile_path: str
    """file of a profile, or 'cached' for the one that `reattend profile seka MODEL` keeps"""
    official_span: bool
    """find passages by the official rule, which loses tokens that begin before the passage"""
    official_index: bool
    """give the profile's layers to the chosen ones in order, as the official code does, not by number"""

class SelectiveEmphasisParameters(TypedDict, total=False):
    """Strengthens the image tokens that the vision encoder itself singles out: grounded details and summaries."""

    first_layer: int
    """first decoder layer that is changed"""
    last_layer: int | None
    """last decoder layer that is changed; None = the model's last, -2 = the one before"""
    alpha: float
    """growth of local tokens' scores; 0 = none, answers break up above 0.8"""
    beta: float
    """growth of summary tokens' scores; 0 = none"""
    local_share: float
    """how many of an image's tokens are local ones, as a share of all"""
    spatial_share: float
    """as many more, by what all patches together look at in the first encoder layer"""
    by_head: bool
    """strengthen each head by its share of image attention, as the abstract describes"""

class SoftInjectionParameters(TypedDict, total=False):
    """Mixes what demonstrations of a task taught each head into the last token of prompts that come without them."""

    task: str | None
    """which of the profile's tasks; needed where it holds several"""
    scale: float
    """factor on the learned shares; 0 changes nothing"""
    alpha: float | None
    """this share for every head instead of the learned ones, which then only say which are best"""
    top_k: int | None
    """only the heads with the largest learned shares; None = all heads"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None | Mapping[int, Sequence[int]]
    """only these heads: [[layer, head], ...] or {layer: [heads]}; None = all heads"""
    profile_path: str
    """file of a profile, or 'cached' for the one kept for this model (see reattend.recipes.cached_profile)"""

class SoftPAGParameters(TypedDict, total=False):
    """Pushes an image away from a copy whose chosen attention heads were weakened: clearer structure and detail."""

    scale: float
    """how far the image is pushed away from the weakened branch; 0 = not"""
    rescale: float
    """how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring
    pictures; 0 = not (a pipeline's own guidance_rescale does the same)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none"""
    layers: Sequence[int] | None
    """layers that are perturbed in all heads, numbered over all self-attention of the denoiser (UNet: down, mid, up; Flux:
    double, then single blocks); default: a UNet's mid block (for small pictures, where that sees fewer than 8 x 8
    places, the last layer of the first block after it that sees as many), layer 9 of SD3-medium, the middle layer of
    other models"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None
    """single heads as [layer, head] pairs, instead of whole layers; for example found by a head search"""
    scope: Literal["image", "all", "masked"]
    """rows weakened where image and text share a stream: image tokens only, all tokens, or image tokens that still see the
    text ('masked'), as diffusers has it in its SD3 PAG pipeline"""
    strength: float
    """how far the chosen heads are weakened in the branch; 1 = PAG"""
    perturbation: Literal["identity", "uniform", "mean_query", "argmax", "temperature"]
    """what the maps are pulled towards: each token itself, all tokens evenly, the mean query's map, each row's strongest
    token, or a flatter softmax; scope 'masked' goes with 'identity' only"""
    temperature: float
    """softmax temperature of perturbation 'temperature'; 1 = none"""

class SPAParameters(TypedDict, total=False):
    """Makes marked passages count more for every next token, by the difference that hiding them makes."""

    text: str | Sequence[str] | Sequence[Sequence[str]] | None
    """passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[Sequence[tuple[int, int] | Sequence[Any]]] | None
    """token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"""
    occurrence: int | None
    """which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"""
    strength: float
    """weight of what the passages contribute: 1 changes nothing, 0 ignores them, below 0 turns against them; plain up to
    2, modulated up to 20"""
    modulated: bool
    """change likely tokens most, which bears larger strengths; acts on strengths beyond -1 to 1"""
    placeholder: Sequence[int] | None
    """token ids that stand for a passage in the second branch; None = its own tokens, hidden"""
    hide: bool
    """hide the passages' tokens (or placeholders) from the second branch's attention"""
    official_mask: bool
    """hide placeholders while the prompt is read only, as the official code does by leaving out a mask"""

class SpotlightParameters(TypedDict, total=False):
    """Lifts a language model's attention on marked passages towards a target share, only where it is below."""

    text: str | Sequence[str] | Sequence[Sequence[str]] | None
    """passages to emphasise, exactly as in the prompt: one, several in every prompt, or a list of them per prompt"""
    ranges: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[Sequence[tuple[int, int] | Sequence[Any]]] | None
    """token ranges [start, stop) instead, counted from the first real token: for every prompt, or per prompt"""
    occurrence: int | None
    """which occurrence of a passage, from 0, -1 = the last; None: a passage that occurs twice in a prompt is an error"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | Sequence[int] | None | Mapping[int, Sequence[int]]
    """{layer: [query heads]}, or a list of (layer, head) pairs, or a list of whole layers; None = all heads"""
    target: float
    """share of a row's attention that the passages are to get; 0 changes nothing, above 0.6 answers lose the rest"""
    exact: bool
    """end at the target itself; off, as published: below it, at target / (target + 1 - share before)"""
    largest_factor: float
    """bound on the factor on a weight, so that a head that ignores the passages is not forced onto a single token"""
    min_share: float
    """rows that give the passages less than this are left alone: their heads serve another purpose; 0.001 is a start"""

class StreamingParameters(TypedDict, total=False):
    """Keeps only the first few tokens and a recent window visible, so that long prompts cost less."""

    sinks: int
    """how many of each sequence's first tokens stay visible to all later ones"""
    window: int
    """how many recent tokens, the current one included, stay visible"""
    last_rows: int
    """how many of the prompt's last rows see everything (tri-shape: 100); 0 = none"""
    start_layer: int
    """first layer with the window; the layers below see everything"""

class TPGParameters(TypedDict, total=False):
    """Pushes an image away from a copy whose tokens were shuffled: better structure, with a prompt or without."""

    scale: float
    """how far the image is pushed away from the perturbed branch; 0 = not"""
    rescale: float
    """how far the guided prediction is brought back to the spread of the conditional one, against pale or glaring
    pictures; 0 = not (a pipeline's own guidance_rescale does the same)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none"""
    blocks: Sequence[int] | None
    """transformer blocks before which the branch's image tokens are shuffled, numbered over all of the denoiser (UNet:
    down, mid, up; Flux: double, then single blocks); default: 6 to 23 of SDXL; of other UNets the last down block with
    attention (where that sees fewer than 8 x 8 places, the block after the middle that sees as many); the middle block
    of other models"""
    seed: int
    """another seed shuffles otherwise; the pipeline's generator plays no part in it"""
    official_rng: bool
    """draws from torch's global generator, as the official code does: no two runs are then the same"""
    force: bool
    """also where places are known at the model's input alone (SD3, PixArt, AuraFlow), where the branch is but the
    prediction with its patches shuffled"""

class VARParameters(TypedDict, total=False):
    """Moves attention from meaningless sink tokens to the rest of the image, in the heads that look at it."""

    first_layer: int
    """first decoder layer that is changed"""
    last_layer: int | None
    """last decoder layer that is changed; None = the model's last, -2 = the one before"""
    move: float
    """fraction of the sinks' weight that is moved; 0 changes nothing (code: 1 - p)"""
    tau: float
    """a token is a sink if a sink dimension exceeds this many times its rms value"""
    rho: float
    """largest share of image weight on sinks in a row that is changed"""
    summ: float
    """least weight on the whole image in a row that is changed"""
    sink_dims: Sequence[int] | None
    """hidden dimensions in which sinks show; None: known ones of the model, or those of the profile"""
    skip_last_layer: bool
    """leave the model's last layer alone, as the paper says (the code does not)"""
    profile_path: str | None
    """file with the sink dimensions that a profiling run found; 'cached': the profile kept for this model"""

class VHRParameters(TypedDict, total=False):
    """Strengthens the heads whose output depends on the image most, chosen anew for every image and question."""

    alpha: float
    """factor on the chosen heads' outputs; 1 changes nothing, 2 or 3 are good, from 4 on text breaks"""
    layers: Sequence[int] | None
    """layers in which heads are chosen, from 0; None = layer 1 and the last 14, as published for 32 layers"""
    remove_outliers: bool
    """pass over heads that merely surge when the image is missing, instead of seeing something in it"""
    ta_squared: bool
    """judge that surge by the squared length of the text-only output instead of its length"""
    heads: Sequence[tuple[int, int] | Sequence[Any]] | None | Mapping[int, Sequence[int]]
    """for research: strengthen these heads of every sample, [[layer, head], ...] or {layer: [heads]}, without measuring"""

class VisualTokenExitParameters(TypedDict, total=False):
    """Image tokens take no part in the layers after an exit layer, where the text has already absorbed them."""

    exit_layer: int | None
    """the last layer that sees the image, from 0; smaller saves more and changes more"""
    profile_path: str | None
    """file with the exit layer that a profiling run chose; 'cached': the profile kept for this model"""
    mode: Literal["hide", "leave"]
    """'hide': no row sees the image after the exit, with any model, cache and other recipe, and at full cost; 'leave':
    image tokens (and padding) leave the sequence there, for the same answers with less work and shorter caches"""

class VSFParameters(TypedDict, total=False):
    """Takes a negative text's values away inside attention: negative prompts for few-step models without CFG, without a further pass."""

    tensors: str | None
    """the negative text as tensors instead, for models without text encoders: a safetensors file with prompt_embeds
    [texts, tokens, width], with pooled_prompt_embeds where the model has them, and prompt_attention_mask [texts,
    tokens], 1 = a word, 0 = padding. Without that mask padding acts as words do (nag reads it as the model reads its
    prompt's)"""
    start: float
    """first part of the schedule with guidance, as a fraction of the steps"""
    stop: float
    """the fraction of the steps from which on there is none; the effect lies in the first ones"""
    negative: str | Sequence[str]
    """what is taken out of the image: one text, or one per prompt; '' = nothing, no change. The pipeline's own
    negative_prompt is not read"""
    scale: float | None
    """how much of the negative text's values is taken away; 1 = as much as they would have added; 0 = none, but its tokens
    still take their share of the attention, so the picture is not the untouched one. Default: 3 for SD3, 6 for Flux,
    1.7 for Wan and other models with cross-attention, 3 for others"""
    offset: float | None
    """how much less the image attends to the negative text, subtracted from scores before the softmax; below 0 = more.
    Default: 0.08 for SD3, 0 for Flux, 0.2 for Wan and other models with cross-attention, 0.08 for others"""
    text_rows: Literal["pipeline", "script"]
    """in joint attention: whether a plain copy of the negative text stays in the prompt, as in the authors' pipeline, or
    none, as in their script ('script')"""

@overload
def apply(
    model: Any,
    name: Literal["act"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[ACTParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["attencraft"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[AttenCraftParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["attend-and-excite"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[AttendAndExciteParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["attentive-eraser"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[AttentiveEraserParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["block-topk"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[BlockTopKParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["cmai"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[CMAIParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["csg"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[CSGParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["emphasise"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[EmphasiseParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["entropy-scaling"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[EntropyScalingParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["evit"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[EViTParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["gift"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[GIFTParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["headhunter"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[HeadHunterParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["instaboost"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[InstABoostParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["nag"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[NAGParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["opera"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[OPERAParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["pag"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[PAGParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["pai"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[PAIParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["pine"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[PineParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["primecomposer"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[PrimeComposerParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["prompt-reweight"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[PromptReweightParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["regional"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[RegionalParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["retrieval-heads"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[RetrievalHeadsParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["seg"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SEGParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["seka"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SEKAParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["selective-emphasis"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SelectiveEmphasisParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["soft-injection"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SoftInjectionParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["softpag"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SoftPAGParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["spa"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SPAParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["spotlight"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[SpotlightParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["streaming"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[StreamingParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["tpg"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[TPGParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["var"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[VARParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["vhr"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[VHRParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["visual-token-exit"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[VisualTokenExitParameters],
) -> Session: ...
@overload
def apply(
    model: Any,
    name: Literal["vsf"],
    /,
    *,
    isolated: bool = False,
    tokenizer: Any = None,
    **parameters: Unpack[VSFParameters],
) -> Session: ...
@overload
def apply(model: Any, *recipes: Choice, isolated: bool = False, tokenizer: Any = None, **parameters: Any) -> Session: ...
@overload
def recipe(
    name: Literal["act"],
    /,
    **parameters: Unpack[ACTParameters],
) -> ACT: ...
@overload
def recipe(
    name: Literal["attencraft"],
    /,
    **parameters: Unpack[AttenCraftParameters],
) -> AttenCraft: ...
@overload
def recipe(
    name: Literal["attend-and-excite"],
    /,
    **parameters: Unpack[AttendAndExciteParameters],
) -> AttendAndExcite: ...
@overload
def recipe(
    name: Literal["attentive-eraser"],
    /,
    **parameters: Unpack[AttentiveEraserParameters],
) -> AttentiveEraser: ...
@overload
def recipe(
    name: Literal["block-topk"],
    /,
    **parameters: Unpack[BlockTopKParameters],
) -> BlockTopK: ...
@overload
def recipe(
    name: Literal["cmai"],
    /,
    **parameters: Unpack[CMAIParameters],
) -> CMAI: ...
@overload
def recipe(
    name: Literal["csg"],
    /,
    **parameters: Unpack[CSGParameters],
) -> CSG: ...
@overload
def recipe(
    name: Literal["emphasise"],
    /,
    **parameters: Unpack[EmphasiseParameters],
) -> Emphasise: ...
@overload
def recipe(
    name: Literal["entropy-scaling"],
    /,
    **parameters: Unpack[EntropyScalingParameters],
) -> EntropyScaling: ...
@overload
def recipe(
    name: Literal["evit"],
    /,
    **parameters: Unpack[EViTParameters],
) -> EViT: ...
@overload
def recipe(
    name: Literal["gift"],
    /,
    **parameters: Unpack[GIFTParameters],
) -> GIFT: ...
@overload
def recipe(
    name: Literal["headhunter"],
    /,
    **parameters: Unpack[HeadHunterParameters],
) -> HeadHunter: ...
@overload
def recipe(
    name: Literal["instaboost"],
    /,
    **parameters: Unpack[InstABoostParameters],
) -> InstABoost: ...
@overload
def recipe(
    name: Literal["nag"],
    /,
    **parameters: Unpack[NAGParameters],
) -> NAG: ...
@overload
def recipe(
    name: Literal["opera"],
    /,
    **parameters: Unpack[OPERAParameters],
) -> OPERA: ...
@overload
def recipe(
    name: Literal["pag"],
    /,
    **parameters: Unpack[PAGParameters],
) -> PAG: ...
@overload
def recipe(
    name: Literal["pai"],
    /,
    **parameters: Unpack[PAIParameters],
) -> PAI: ...
@overload
def recipe(
    name: Literal["pine"],
    /,
    **parameters: Unpack[PineParameters],
) -> Pine: ...
@overload
def recipe(
    name: Literal["primecomposer"],
    /,
    **parameters: Unpack[PrimeComposerParameters],
) -> PrimeComposer: ...
@overload
def recipe(
    name: Literal["prompt-reweight"],
    /,
    **parameters: Unpack[PromptReweightParameters],
) -> PromptReweight: ...
@overload
def recipe(
    name: Literal["regional"],
    /,
    **parameters: Unpack[RegionalParameters],
) -> Regional: ...
@overload
def recipe(
    name: Literal["retrieval-heads"],
    /,
    **parameters: Unpack[RetrievalHeadsParameters],
) -> RetrievalHeads: ...
@overload
def recipe(
    name: Literal["seg"],
    /,
    **parameters: Unpack[SEGParameters],
) -> SEG: ...
@overload
def recipe(
    name: Literal["seka"],
    /,
    **parameters: Unpack[SEKAParameters],
) -> SEKA: ...
@overload
def recipe(
    name: Literal["selective-emphasis"],
    /,
    **parameters: Unpack[SelectiveEmphasisParameters],
) -> SelectiveEmphasis: ...
@overload
def recipe(
    name: Literal["soft-injection"],
    /,
    **parameters: Unpack[SoftInjectionParameters],
) -> SoftInjection: ...
@overload
def recipe(
    name: Literal["softpag"],
    /,
    **parameters: Unpack[SoftPAGParameters],
) -> SoftPAG: ...
@overload
def recipe(
    name: Literal["spa"],
    /,
    **parameters: Unpack[SPAParameters],
) -> SPA: ...
@overload
def recipe(
    name: Literal["spotlight"],
    /,
    **parameters: Unpack[SpotlightParameters],
) -> Spotlight: ...
@overload
def recipe(
    name: Literal["streaming"],
    /,
    **parameters: Unpack[StreamingParameters],
) -> Streaming: ...
@overload
def recipe(
    name: Literal["tpg"],
    /,
    **parameters: Unpack[TPGParameters],
) -> TPG: ...
@overload
def recipe(
    name: Literal["var"],
    /,
    **parameters: Unpack[VARParameters],
) -> VAR: ...
@overload
def recipe(
    name: Literal["vhr"],
    /,
    **parameters: Unpack[VHRParameters],
) -> VHR: ...
@overload
def recipe(
    name: Literal["visual-token-exit"],
    /,
    **parameters: Unpack[VisualTokenExitParameters],
) -> VisualTokenExit: ...
@overload
def recipe(
    name: Literal["vsf"],
    /,
    **parameters: Unpack[VSFParameters],
) -> VSF: ...
@overload
def recipe(name: str, /, **parameters: Any) -> Recipe: ...

class Uses:
    @overload
    def use(
        self,
        name: Literal["act"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[ACTParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["attencraft"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[AttenCraftParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["attend-and-excite"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[AttendAndExciteParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["attentive-eraser"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[AttentiveEraserParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["block-topk"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[BlockTopKParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["cmai"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[CMAIParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["csg"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[CSGParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["emphasise"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[EmphasiseParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["entropy-scaling"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[EntropyScalingParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["evit"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[EViTParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["gift"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[GIFTParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["headhunter"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[HeadHunterParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["instaboost"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[InstABoostParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["nag"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[NAGParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["opera"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[OPERAParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["pag"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[PAGParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["pai"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[PAIParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["pine"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[PineParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["primecomposer"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[PrimeComposerParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["prompt-reweight"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[PromptReweightParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["regional"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[RegionalParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["retrieval-heads"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[RetrievalHeadsParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["seg"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SEGParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["seka"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SEKAParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["selective-emphasis"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SelectiveEmphasisParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["soft-injection"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SoftInjectionParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["softpag"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SoftPAGParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["spa"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SPAParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["spotlight"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[SpotlightParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["streaming"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[StreamingParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["tpg"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[TPGParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["var"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[VARParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["vhr"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[VHRParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["visual-token-exit"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[VisualTokenExitParameters],
    ) -> Session: ...
    @overload
    def use(
        self,
        name: Literal["vsf"],
        /,
        *,
        isolated: bool = False,
        tokenizer: Any = None,
        **parameters: Unpack[VSFParameters],
    ) -> Session: ...
    @overload
    def use(self, *recipes: Choice, isolated: bool = False, tokenizer: Any = None, **parameters: Any) -> Session: ...
