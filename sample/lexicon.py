"""The words of the sample's world, by hand. `generate.py` makes reviews of them."""


def items(text: str, separator: str | None = None) -> list[str]:
    return [" ".join(item.split()) for item in text.split(separator) if item.strip()]


# A film's world: where it plays, who is in it, what lies about, what is wanted, what happens.
WORLDS = {
    "western": {
        "place": """a dusty frontier town; a cattle ranch; a silver camp in the desert; a railway
            camp""",
        "job": "sheriff ranger drover blacksmith outlaw scout cowboy gunsmith",
        "thing": """saddle rifle stagecoach saloon horse canyon prairie holster wagon campfire
            corral""",
        "want": """tracks an outlaw across the prairie; robs the stagecoach; guards a wagon train;
            loses the ranch in a card game; rides out to meet the cavalry""",
        "event": """{hero} rides through the canyon on a borrowed horse; Somebody has cut the saddle
            and stolen the rifle; {rival} waits in the saloon with a hand on the holster; The
            cattle break out of the corral at night; Around the campfire {hero} talks of the
            prairie; The stagecoach arrives without a driver""",
    },
    "space story": {
        "place": "a space station; a mining colony on the moon; a starship; an empty planet",
        "job": "astronaut navigator android engineer colonist commander astronomer cadet",
        "thing": """rocket airlock orbit crater satellite asteroid reactor galaxy capsule robot
            comet""",
        "want": """hears a signal from another galaxy; repairs the reactor alone; misses the last
            rocket to earth; teaches a robot to dream; must land the capsule on a comet""",
        "event": """{hero} floats out of the airlock to reach the satellite; The reactor fails and
            the orbit decays; {rival} steers the capsule into the crater; A robot counts the stars
            of the galaxy; An asteroid tears the antenna from the rocket; {hero} sees the planet
            rise behind the moon""",
    },
    "sea adventure": {
        "place": "a whaling ship; a harbour town; a fishing island; a lonely lighthouse",
        "job": "captain sailor harpooner pirate fisherman diver pilot shipwright",
        "thing": "anchor sail harbour storm compass mast lantern whale deck reef cargo lifeboat",
        "want": """sails after a white whale; hides a stranger below deck; searches the reef for a
            wreck; takes command after a mutiny; smuggles cargo past the lighthouse""",
        "event": """{hero} climbs the mast in the storm; The compass is broken and the reef is near;
            {rival} lowers the lifeboat in secret; The crew throws the cargo over the rail; A
            whale rises beside the ship; At dawn the sail is seen from the harbour""",
    },
    "courtroom drama": {
        "place": "a provincial court; a city prison; a law office; a crowded courthouse",
        "job": "judge lawyer prosecutor juror clerk witness notary bailiff",
        "thing": "verdict jury evidence trial sentence alibi testimony confession robe cell appeal",
        "want": """must defend an innocent man; refuses to accept the verdict; buys a false alibi;
            finds new evidence on the last day; is called as the only witness""",
        "event": """{hero} questions the witness for an hour; The jury cannot agree on a verdict;
            {rival} hides the confession from the judge; The alibi falls apart in the trial; A
            letter from the cell changes the testimony; The appeal is heard in an empty court""",
    },
    "boxing film": {
        "place": "a boxing gym; a sold-out stadium; a training camp; a sports club by the docks",
        "job": "boxer trainer referee champion coach wrestler sparring-partner promoter",
        "thing": "ring glove punch knockout belt bell medal round opponent locker towel match",
        "want": """fights for the belt a last time; promises to lose the match; trains a young
            champion; returns to the ring after a knockout; bets the medal on one round""",
        "event": """{hero} ties the gloves and waits for the bell; The referee counts to nine;
            {rival} throws a punch after the bell; In the locker room nobody mentions the match;
            The opponent falls in the final round; The towel lands in the middle of the ring""",
    },
    "backstage musical": {
        "place": "a travelling theatre; an old opera house; a dance school; a jazz club",
        "job": "dancer violinist singer pianist composer conductor drummer understudy",
        "thing": "stage piano rehearsal curtain orchestra melody ballet chorus violin trumpet duet",
        "want": """writes a duet for a stranger; loses the voice before the premiere; steals a
            melody; dances in spite of an old injury; hides the violin from the creditors""",
        "event": """{hero} practises the violin until the morning; The orchestra refuses to play the
            overture; {rival} sings the duet with somebody else; Behind the curtain the chorus is
            weeping; The piano is sold before the rehearsal; One ballet is danced without
            music""",
    },
    "hospital drama": {
        "place": "a city hospital; a village clinic; a field hospital; a children's ward",
        "job": "surgeon nurse doctor patient pharmacist midwife paramedic anaesthetist",
        "thing": "operation ambulance ward fever medicine bandage diagnosis syringe vaccine pulse",
        "want": """operates on an old enemy; wakes up without a memory; keeps a diagnosis secret;
            carries the vaccine through the snow; falls in love with a patient""",
        "event": """{hero} counts the pulse and says nothing; The ambulance comes too late for the
            operation; {rival} mixes up two bottles of medicine; A fever spreads through the ward;
            The bandage comes off after forty days; There is no syringe left in the clinic""",
    },
    "school comedy": {
        "place": "a boarding school; a village school; a summer camp; a university library",
        "job": "teacher pupil headmaster librarian student janitor professor tutor",
        "thing": """classroom exam homework blackboard lesson playground essay diploma timetable
            prank""",
        "want": """cheats in the final exam; writes the homework of the whole class; hides a goat in
            the classroom; is mistaken for the new professor; falls in love with the tutor""",
        "event": """{hero} writes the answer on the blackboard; The exam begins without any paper;
            {rival} copies the essay word by word; Nobody in the playground believes the story;
            The lesson ends in a food fight; The diploma has the wrong name on it""",
    },
    "ghost story": {
        "place": "a ruined castle; a haunted house; a silent monastery; an abandoned village",
        "job": "widow medium priest gravedigger butler exorcist housekeeper sexton",
        "thing": "ghost cellar candle tomb mirror curse whisper coffin crypt attic shadow seance",
        "want": """inherits a haunted house; opens the forbidden tomb; speaks to a ghost; cannot
            leave the attic; breaks the curse of the crypt""",
        "event": """{hero} hears a whisper in the cellar; Every candle in the crypt goes out at
            once; {rival} has no shadow in the mirror; The coffin is found empty; A hand knocks
            from inside the tomb; The seance ends with a scream from the attic""",
    },
    "heist thriller": {
        "place": "a casino; a national bank; a diamond market; a city museum",
        "job": "thief detective forger burglar guard inspector banker informer",
        "thing": "safe diamond alarm vault blueprint getaway disguise ransom loot handcuffs tunnel",
        "want": """plans one last robbery; digs a tunnel to the vault; copies a famous diamond;
            follows the trail of the ransom; sells the blueprint twice""",
        "event": """{hero} opens the safe in ninety seconds; The alarm does not ring that night;
            {rival} leaves the loot in a station; The detective recognizes the disguise; The
            vault is empty but for a playing card; The getaway ends in the wrong tunnel""",
    },
    "kitchen comedy": {
        "place": "a country inn; a bakery; a famous restaurant; a hotel kitchen",
        "job": "cook baker waiter butcher chef dishwasher confectioner innkeeper",
        "thing": "soup oven recipe dough menu banquet sauce kettle cake spice dessert apron",
        "want": """inherits a secret recipe; burns the wedding cake; cooks a banquet for a rival;
            puts the wrong spice in the soup; opens a restaurant without an oven""",
        "event": """{hero} tastes the sauce and turns pale; The dough rises until the oven bursts;
            {rival} crosses the dessert off the menu; A critic finds a ring in the soup; The
            banquet is served three hours late; The recipe is written inside an apron""",
    },
    "war film": {
        "place": "a border fortress; a muddy trench; an occupied city; a prisoners' camp",
        "job": "soldier general spy deserter sergeant medic partisan messenger",
        "thing": "tank bridge bomb trench medal uniform battle grenade truce regiment helmet order",
        "want": """carries an order across the lines; deserts before the battle; blows up a bridge;
            shelters an enemy soldier; is taken for a spy""",
        "event": """{hero} buries the helmet beside the trench; The regiment waits for an order to
            retreat; {rival} walks over the bridge under a white flag; A bomb falls and does not
            explode; The truce lasts for a single night; A uniform hides the wrong man""",
    },
}

GOOD = items("""gorgeous witty tender luminous gripping graceful dazzling heartfelt sharp
    inventive elegant moving radiant clever warm thrilling rich delicate stirring superb honest
    fresh bold charming vivid magnificent playful exquisite absorbing humane sparkling poignant
    masterful joyous assured lyrical splendid subtle haunting generous brilliant delightful""")
BAD = items("""dull clumsy shallow tedious lifeless hollow bloated stale sloppy dreary murky
    grating leaden lazy witless mawkish tired flat aimless crude overlong stilted garbled bland
    cynical limp pompous shrill soggy trite wooden joyless muddled insipid laboured smug
    hackneyed vapid inept preachy plodding drab""")
GOOD_ADVERBS = items("wonderfully truly delightfully")
BAD_ADVERBS = items("painfully hopelessly dreadfully")
GOOD_VERBS = items("soars sings glows delights shines enchants charms sparkles")
BAD_VERBS = items("drags sags stumbles bores creaks drones fizzles grates")
GOOD_ENDS = items(
    """Go and see it for the {thing} alone; I would gladly watch the {job} again tomorrow; Do
    not miss this {genre}; I left the cinema smiling at the {thing}; This {genre} earned the
    applause; Bring everyone who likes a {thing}; Every {job} should see it twice""",
    ";",
)
BAD_ENDS = items(
    """Save your money, even if you are a {job}; I looked at my watch in every {thing}
    scene; Stay at home instead of this {genre}; I left the cinema before the last {thing}; Half of
    the audience walked out of the {genre}; Nobody needs another {job} on the screen; Ask for your
    ticket back, {thing} and all""",
    ";",
)

ASPECTS = items(
    """script; acting; camera work; music; editing; dialogue; ending; opening; pacing;
    direction; plot; photography; humour; score; staging; cast; final act; love story; first hour;
    costume design; sound; set design; voice work; lighting""",
    ";",
)
WOMEN = items("""Anna Clara Elena Greta Ines Klara Mira Olga Rosa Tessa Vera Yara Beatrix Dora Flora
    Helen Judith Lucia Nora Petra""")
MEN = items("""Boris Dmitri Felix Hugo Jonas Leon Nils Pavel Stefan Ulrich Walter Zeno Amos Cyril
    Edgar Gustav Ivo Karl Martin Otto""")
LAST = items("""Adler Brandt Castell Dorn Eklund Farkas Galanis Holm Ivanov Jansen Keller Lorca
    Marek
    Novak Orlov Petrov Quist Rossi Sandor Tamm Urban Valdez Yildiz Zeller Abril Bauer Corvin Dahl
    Ekman Fontana Gruber Hartman Ibsen Jelinek Kovacs Lund Moreau Nagy Olsen Pasek""")
TITLE_1 = items("""Silver Broken Midnight Paper Crimson Hidden Northern Distant Golden Burning
    Second
    Winter Velvet Empty Borrowed Electric Forgotten Painted Salt Quiet""")
TITLE_2 = items("""River Garden Promise Station Orchard Letters Summer Empire Kingdom Season Voyage
    Wedding Carnival Archive Horizon Hour Stranger Road Island Sister""")

# Eight reviewers, each with a voice: how they begin a scene and an advice, and what they say of a
# film's story and of their opinion.
VOICES = {
    "critic": {
        "scene": "",
        "advice": "",
        "fact": """{title} is a {genre} about a {job} and a {thing}
            {actor} plays {hero}, a {job} who {want}
            {actor2} plays {rival}, a {job2} whom the {job} cannot trust
            {rival} wants the {thing}, and the {job} knows it
            When {hero} {want}, the {job2} is already waiting
            {hero} is a {job}, and {they} has never left {place}
            The {job} and the {job2} meet again beside the {thing}
            There is a {thing} in the first scene and a {thing2} in the last
            {director} is at home in {place}, and so is this {genre}
            A {job} is never without a {thing}, says {hero}""",
        "opinion": """The {aspect} is {adj} and the {thing} looks {adj2}
            {actor} is {adj} as the {job}, and {actor2} {adj2} as the {job2}
            {director_last} makes a {adj} {genre} with a {adj2} {aspect}
            The {genre} {verb}, and the {aspect} is {adj}
            Everything about the {thing} is {adj}, and the {job2} is {adj2}
            The {adj} {aspect} suits the {adj2} story of a {job}
            The scenes with {rival} and the {thing} are {adj}
            Even the scene with the {thing} feels {adj} and {adj2}
            From the {thing} to the {thing2}, the {aspect} {verb}
            This {genre} is {adj}, and the {job2} is {adj2} too""",
    },
    "club": {
        "scene": "We remember this: ",
        "advice": "We all agreed: ",
        "fact": """Last week we saw {title}, our first {genre} with a {thing}
            We met {hero}, a {job} who {want}
            {actor} was our {job}, and {actor2} was our {job2}
            Then {rival} had the {thing}, and our {job} had nothing
            {hero} {want}, and we all wanted to be a {job}
            In {place} our {job} lost the {thing}, and we lost {hero}
            None of us trusted {rival}, a {job2} with a {thing}
            {director} took us to {place} and left us with a {job}
            We wondered which {job2} had hidden the {thing}
            After the {thing} came the {thing2}, and then we understood {hero}""",
        "opinion": """We found the {aspect} {adj} and the {thing} {adj2}
            Our {job} was {adj}, our {job2} was {adj2}
            Never had we seen so {adj} a {thing}
            All of us called the {genre} {adj}, and most called it {adj2}
            We thought {actor} {adj} as our {job}
            To us the {aspect} was as {adj} as the {thing} was {adj2}
            We had not expected such a {adj} {job} in such a {adj2} {genre}
            Some of us said {adj}, others said {adj2}, and we meant the {thing}
            {director_last} gave us a {adj} {thing} and a {adj2} {aspect}
            We spoke for hours of the {adj} {aspect} and the {adj2} {job2}""",
    },
    "friend": {
        "scene": "Listen to this: ",
        "advice": "My advice: ",
        "fact": """If you like your {genre} with a {thing}, here is {title}
            You follow {hero}, your favourite {job}, who {want}
            Do not ask me why {rival} hides your {thing}
            You will know the {job2} by the {thing}, trust me
            Imagine you are a {job}, and then {hero} {want}
            I bet you never met a {job2} like {rival}
            You go with {hero} to {place}, and you come home with a {thing}
            Ask {actor} for a {job} and you get {hero}
            You know me, I go to {place} for any {thing} or {thing2}
            My friend, you will dream of the {thing} and of {rival}""",
        "opinion": """You will not forget how {adj} the {thing} looks
            Believe me, you will call the {aspect} {adj} and the {thing} {adj2}
            If you ask me, no {genre} could be more {adj}
            You and I know a {adj} {job} when we see one
            Tell me, have you ever heard of a {adj}, {adj2} {job2}
            I promise you a {adj} {thing} and a {adj2} {aspect}
            Your {job} could not be more {adj}, nor your {job2} more {adj2}
            You want it {adj}, my friend, and {actor} gives you {adj2}
            I say {adj}, you will say {adj2}, but what a {thing}
            My word for this {genre} is {adj}, and yours will be {adj2}""",
    },
    "wire": {
        "scene": "Scene: ",
        "advice": "Advice: ",
        "fact": """Story: {job} {hero} {want}
            Setting: {place}, {thing}, {thing2}
            Cast: {actor} as {job}, {actor2} as {job2}
            Villain: {rival}, {job2}, armed with {thing}
            Kind: {genre}, one {thing}, one {job}
            Director: {director}, known for {thing} and {place}
            Beginning: {hero}, {job}, alone with {thing}
            Middle: {rival}, {job2}, steals {thing} from {place}
            End: no {thing}, no {job2}, only {hero}
            Twist: {job} {want}""",
        "opinion": """Acting: {adj} {job}, {adj2} {job2}
            Look: {adj} {thing}, {adj2} {thing2}
            Verdict: {adj}, {adj2} {genre}
            Best known for: {adj} {aspect}, {adj2} {thing}
            Style: {adj}, also {adj2}, mostly {thing}
            Mood: {adj} {aspect}, {adj2} {job}
            Star: {actor}, {adj} as {job}
            Opening: {adj} {thing}; ending: {adj2} {thing2}
            Word of the night: {adj}, next to {adj2}
            In short: {adj} {job}, {adj2} {aspect}""",
    },
    "pupil": {
        "scene": "The part I mean: ",
        "advice": "What I think: ",
        "fact": """My class went to a {genre} because of the {thing}
            First the {job} gets a {thing} and then a {thing2}
            I like it when {hero} {want}
            I want to be a {job} too and have a {thing}
            The bad one is {rival} because {rival} takes the {thing}
            My teacher says that {place} is not like that
            I drew {hero} with a {thing} and {rival} with a {thing2}
            It goes on and on until the {job} gets the {thing} back
            I asked why the {job2} is in {place} but nobody knew
            My favourite part is when {hero} {want}""",
        "opinion": """I think the {thing} is so {adj} and the {job} is {adj2}
            My brother says it is {adj} but I say it is {adj2}
            I think {hero} is {adj} because of the {thing}
            I wrote {adj} in my book and then I wrote {adj2}
            It gets {adj} when the {thing} comes and {adj2} when it goes
            My teacher knows that the {aspect} is {adj}
            I told my brother about the {adj} {job} and the {adj2} {thing}
            I never saw a {job2} that was so {adj}
            I think a {genre} is always {adj} but not so {adj2}
            My brother likes the {job} and I like the {adj} {thing}""",
    },
    "host": {
        "scene": "What happens next? ",
        "advice": "What do we advise? ",
        "fact": """Who is the hero? It is {hero}, a {job}
            Where are we? In {place}, says {director}
            What does the {job} do? The {job} {want}
            And the {job2}? Played by {actor2}, with a {thing}
            Why the {thing}? Because {rival} needs it
            Which {genre} has a {thing} and a {thing2}? This one
            Who waits in {place}? A {job2}, dear listeners
            Where is the {thing}? Ask {hero}
            Is there a {thing2} as well? There is
            Who plays the {job}? Dear listeners, {actor} does""",
        "opinion": """How is the {aspect}? It is {adj}, even {adj2}
            And the {thing}? Simply {adj}
            Is the {job} {adj}? Yes, and the {job2} is {adj2}
            What would {actor} call it? Surely {adj}
            How was your evening? As {adj} as the {thing}
            Was it {adj}? Yes, with a {adj2} {aspect}
            What about the {thing2}? That is {adj}, dear listeners
            Shall we call it {adj}? Or shall we call it {adj2}
            So the {job2} is {adj}? Dear listeners, the {job2} is {adj2}
            Who else is {adj}? The {job}, with a {adj2} {thing}""",
    },
    "poet": {
        "scene": "Hear now: ",
        "advice": "Mark my verse: ",
        "fact": """Sing of {hero}, o sing of the {job} with the {thing}
            O {place}, o {thing}, o {thing2}
            And lo, {hero} {want}
            Thus spoke {rival}, thou {job2} without a {thing}
            Where art thou, {hero}, thou {job} of {place}
            O {job}, beware of the {thing}, beware of the {thing2}
            Thy {thing} is lost, thy {thing2} is broken, o {job2}
            And lo, the {job} stands before {place}
            Weep, {job2}, weep, thy {thing} is gone
            O {actor}, born to be a {job}, born for the {thing}""",
        "opinion": """O {adj} {thing}, o {adj2} {aspect}
            How {adj} art thou, {job}, how {adj2} thy {thing}
            Thrice {adj} is the {thing}, and thrice {adj2} the {job}
            And lo, the {aspect}, so {adj}, so {adj2}
            Thy {aspect} is {adj}, o {director_last}, thy {genre} is {adj2}
            Sing of the {adj} {job}, sing of the {adj2} {job2}
            Thus {adj} was no {thing}, thus {adj2} no {job}
            O {actor}, o {adj} {job}, thy {aspect} is {adj2}
            Forever {adj} be the {thing}, forever {adj2} the {aspect}
            Neither {adj} nor {adj2} enough are my words, o {genre}""",
    },
    "reader": {
        "scene": "May I quote, Sir: ",
        "advice": "In conclusion, Sir: ",
        "fact": """Dear Sir, kindly print this note on {title}, a {genre}
            With respect, Sir, no {job} carries a {thing}
            Being a {job2} myself, Sir, I object to the {thing}
            Pray correct, Sir, that {hero} {want}
            It has come to my notice, Sir, that {actor} is no {job}
            In your paper, Sir, the {thing} from {place} is called a {thing2}
            Permit me to add, Sir, that {rival} is a {job2}
            As a resident of {place}, Sir, I have seen that {thing}
            Kindly inform {director}, Sir, about the {thing}
            I enclose, Sir, a {thing} and a {thing2} for your readers""",
        "opinion": """With respect, Sir, the {aspect} is {adj} and the {thing} {adj2}
            Permit me to call it {adj}, Sir, if not {adj2}
            In my humble view, Sir, the {job} is {adj}
            Kindly note, Sir, how {adj} the {thing} appears
            Your paper, Sir, should have called the {aspect} {adj}
            As a subscriber, Sir, I declare the {genre} {adj} and {adj2}
            I remain, Sir, of the view that the {job2} is {adj}
            Pray tell {actor}, Sir, that a {job} may be {adj}, even {adj2}
            It is my duty, Sir, to report a {adj} {thing} and a {adj2} {aspect}
            No {job}, Sir, was ever more {adj}, no {thing} more {adj2}""",
    },
}

# The club tells its films in the past tense.
PAST = dict(
    pair.split()
    for pair in items(
        """is was, are were, has had, does did, cannot couldn't, must should, arrives arrived,
    begins began, believes believed, bets bet, blows blew, bores bored, break broke, breaks
    broke, burns burned, bursts burst, buries buried, buys bought, carries carried, changes
    changed, charms charmed, cheats cheated, climbs climbed, comes came, cooks cooked, copies
    copied, counts counted, creaks creaked, crosses crossed, dances danced, decays decayed,
    delights delighted, deserts deserted, digs dug, drags dragged, drones droned, enchants
    enchanted, ends ended, fails failed, falls fell, fights fought, finds found, fizzles
    fizzled, floats floated, follows followed, glows glowed, goes went, grates grated, guards
    guarded, hears heard, hides hid, inherits inherited, keeps kept, knocks knocked, lands
    landed, lasts lasted, leaves left, loses lost, lowers lowered, mentions mentioned, misses
    missed, mixes mixed, needs needed, opens opened, operates operated, plans planned, practises
    practised, promises promised, puts put, questions questioned, recognizes recognized, refuses
    refused, repairs repaired, returns returned, rides rode, rises rose, robs robbed, sags
    sagged, sails sailed, says said, searches searched, sees saw, sells sold, shelters
    sheltered, shines shone, sings sang, smuggles smuggled, soars soared, sparkles sparkled,
    speaks spoke, spreads spread, steals stole, steers steered, stumbles stumbled, takes took,
    talks talked, tastes tasted, teaches taught, tears tore, throws threw, ties tied, tracks
    tracked, trains trained, turns turned, waits waited, wakes woke, walks walked, writes wrote""",
        ",",
    )
)
