"""Word lists of the data-free tagger: the closed classes of English, and common words whose ending misleads.

Only the closed classes decide the gate (their words are grammatical scaffolding); the open-class lists keep the tags
themselves right where `tagger.AFFIX_RULES` would guess another one. Nouns need no list except to overrule an ending.
A form that belongs to several classes stands under the one it has most often in descriptions of sound; what depends
on the neighbouring words is left to `tagger.CONTEXT_RULES`.
"""

DETERMINERS = """
a an the this that these those each every no any some all both half another which whichever whatever neither either
"""

PRONOUNS = """
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs myself yourself
himself herself itself ourselves yourselves themselves who whom whose whoever what
"""

ADPOSITIONS = """
of in on at by for with from into onto upon over under above below beneath underneath behind beside besides between
among amongst amid across along alongside around about against during before after since until till through throughout
toward towards within without inside outside via per near past beyond despite except like unlike than as if because
although though while whilst whereas whether unless lest
"""

CONJUNCTIONS = "and or but nor plus & and/or"

PARTICLES = "to up off out '"

AUXILIARIES = """
be am is are was were been being do does did done doing have has had having can could may might must shall should will
would ought need ca wo sha 'm 're 've 'll 'd ai 's
"""

NUMBER_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion
"""

ADVERBS = """
not n't never ever always often sometimes seldom usually again also too very quite rather somewhat almost nearly just
even still yet already soon now then here there everywhere nowhere anywhere somewhere how when where why whenever
wherever however therefore thus hence moreover furthermore otherwise instead meanwhile perhaps maybe indeed well far
away back forth together apart ahead aside once twice only else so down later earlier afterwards beforehand further
forward backward backwards upward upwards downward downwards inward outward nevertheless nonetheless anyway altogether
likewise overall more most less least enough alone abroad indoors outdoors nearby halfway midway sideways alike
alright aloud afresh anew tonight today tomorrow yesterday
"""

ADJECTIVES = """
low high loud quiet soft deep shrill bright dull warm cold cool hot sharp flat dry wet thin thick broad narrow wide
slow fast quick rapid steady smooth rough harsh mellow clear faint weak strong heavy light hard short long brief small
large big huge tiny little great good bad best worst better worse right wrong true false correct sure likely unlikely
first second third fourth fifth sixth last next previous final early late new old young same different other own main
major minor single double whole full empty open close closer distant present absent silent male female human vocal
nasal tonal musical natural mechanical electronic electric acoustic metallic wooden plastic metal hollow resonant
constant frequent recurrent consistent apparent evident prominent dominant relevant ambient violent gentle simple
subtle stable sudden certain uncertain plain alike angry happy sad calm noisy raspy breathy husky gritty muddy airy
reedy tinny boomy bassy busy easy ready merry lively friendly lonely ugly lovely elderly cheerful many few several
much such various able possible similar familiar regular irregular particular popular circular mid upper lower outer
inner higher louder softer deeper slower faster quicker longer shorter shriller brighter duller warmer sharper quieter
clearer stronger weaker bigger smaller larger nearer older younger stranger earliest latest highest lowest loudest
wild odd neutral polite rude tired bored excited worried relaxed surprised scared muffled distorted sustained pitched
fixed mixed low-pitched high-pitched raw crisp rich pure bare fuzzy grainy shaky wavy jumpy squeaky scratchy unclear
due complete separate intimate delicate accurate appropriate moderate ultimate private intermediate immediate
approximate definite
"""

VERBS = """
hear hears heard listen listens sound sounds seem seems appear appears feel feels felt think thinks thought say says
said tell tells told speak speaks spoke spoken talk talks ask asks answer answers call calls mean means meant know
knows knew known believe believes guess suppose assume assumes conclude concludes infer notice notices recognize
consider considers compare compares check checks decide decides choose chooses chose chosen pick picks select selects
match matches fit fits suit suits suggest suggests indicate indicates imply implies point points show shows shown
describe describes contain contains include includes consist consists resemble resembles belong belongs remain remains
become becomes became get gets got go goes went gone come comes came run runs ran keep keeps kept let lets make makes
made take takes took taken give gives gave given put puts set sets hold holds held leave leaves left begin begins
began begun start starts stop stops end ends finish finishes last lasts continue continues repeat repeats occur occurs
happen happens follow follows rise rises rose risen fall falls fell fallen climb climbs drop drops drift drifts peak
peaks dip dips fade fades grow grows grew grown swell swells decay decays change changes shift shifts move moves turn
turns stay stays vary varies play plays sing sings sang sung hum hums buzz buzzes beep beeps ring rings rang rung
knock knocks bark barks chirp chirps cry cries cried laugh laughs shout shouts whisper whispers scream screams cough
coughs sigh sighs walk walks pass passes drive drives break breaks broke broken close closes open opens hit hits
strike strikes struck see sees saw seen look looks want wants wish try tries need needs use uses find finds found lose
loses lost expect expects explain explains exclude excludes eliminate eliminates reject rejects support supports
confirm confirms agree agrees contradict contradicts mention mentions count counts identify identifies determine
determines reveal reveals produce produces create creates cause causes allow allows require requires depend depends
help helps carry carries bring brings brought read reads write writes sit sits sat stand stands stood rule rules lack
lacks lead leads led enter enters exit exits return returns add adds fill fills lie lies wait waits remember
understand understands understood correspond corresponds differ differs align aligns overlap overlaps precede precedes
sustain sustains emphasize analyze examine prove proves represent represents denote focus evaluate narrow narrows blow
blows blew
"""

NOUNS = """
thing things something anything nothing everything someone somebody anyone anybody everyone everybody nobody none
noise noises voice voices tone pulse sweep siren ring string spring king ceiling morning evening wing bed speed seed
breed signal signals interval intervals animal animals vocals chorus bell hospital festival metal music topic traffic
fabric clinic family reply supply assembly butterfly fly belly climate plate gate rate date candidate exercise promise
phrase purpose surprise size prize device practice sentence silence audience instrument moment event element
environment movement accent accident student agent parent client percent restaurant giant elephant infant assistant hz
khz db bpm rpm ms sec tv cd vs mp3 wav recording building painting beginning meaning meeting feeling hearing wedding
warning lightning sibling pudding duckling thousandth native motive detective archive olive cable table vegetable
syllable bible vehicle people example scale hotel radio piano bus octopus virus campus status
"""

INTERJECTIONS = """
oh ah aha hmm hm mm uh um eh hey hi hello ouch oops wow yes yeah yep nope okay ok bye please shh shhh psst pfft brr
grr zzz ding dong woof meow moo oink quack tweet ribbit boing whoosh swoosh thwop clank clunk thud tick tock
"""


def universal_lexicon() -> dict[str, str]:
    """Map lower-case words to universal tags; where lists overlap, the later (closed-class) list wins."""
    lists = (
        ("NOUN", NOUNS),
        ("VERB", VERBS),
        ("ADJ", ADJECTIVES),
        ("X", INTERJECTIONS),
        ("ADV", ADVERBS),
        ("NUM", NUMBER_WORDS),
        ("VERB", AUXILIARIES),
        ("ADP", ADPOSITIONS),
        ("CONJ", CONJUNCTIONS),
        ("PRON", PRONOUNS),
        ("DET", DETERMINERS),
        ("PRT", PARTICLES),
    )
    return {word: tag for tag, words in lists for word in words.split()}
