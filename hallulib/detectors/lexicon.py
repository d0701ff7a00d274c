"""Words the rule-based detector knows: general clinical English, nothing of any one data set."""

from __future__ import annotations

NUMBER_WORDS: dict[str, int] = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen".split()
    )
}
TENS: dict[str, int] = {
    word: 10 * value
    for value, word in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}

# spelling -> unit as the detector writes it
UNITS: dict[str, str] = {
    spelling: unit
    for unit, spellings in {
        "mg": "mg milligram milligrams", "mcg": "mcg ug microgram micrograms",
        "g": "g gram grams", "ml": "ml milliliter milliliters cc", "unit": "unit units iu",
        "mmhg": "mmhg", "mmol": "mmol", "meq": "meq", "percent": "percent",
        "hour": "hour hours hr hrs h", "minute": "minute minutes min mins",
        "day": "day days d", "week": "week weeks wk wks", "month": "month months mo mos",
        "year": "year years yr yrs y yo", "pack": "pack packs", "pound": "pound pounds lb lbs",
        "kg": "kg kilogram kilograms", "cm": "cm centimeter centimeters", "mm": "mm",
        "inch": "inch inches", "degree": "degree degrees",
    }.items()
    for spelling in spellings.split()
}  # fmt: skip

# what a clinician may write -> the words meant; a tuple may be empty (nothing to look up)
EXPANSIONS: dict[str, tuple[str, ...]] = {
    spelling: tuple(meaning.split())
    for spellings, meaning in [
        ("htn hypertensive", "hypertension"), ("dm diabetic", "diabetes"),
        ("sob dyspnea dyspnoea", "short breath"), ("cp", "chest pain"), ("mi", "heart attack"),
        ("cva", "stroke"), ("uti", "urinary infection"), ("nkda", "no known allergy"),
        ("bid", "twice daily"), ("tid", "three times daily"), ("qd od", "once daily"),
        ("qhs nightly", "night"), ("prn", "needed"), ("fu", "followup"),
        ("recheck review return appointment", "followup"), ("bp", "blood pressure"),
        ("hr pulse", "heart rate"), ("male gentleman boy", "man"), ("female lady girl", "woman"),
        ("tobacco tob cigarette cigarettes smoker smokers smoked smokes smoking", "smoke"),
        ("allergic allergies", "allergy"), ("dad", "father"), ("mom mum", "mother"),
        ("lt", "left"), ("rt", "right"), ("bilaterally", "bilateral"),
        ("radiograph", "x ray"), ("cxr", "chest x ray"), ("meds med", "medication"),
        ("hypertensives", "hypertension"), ("anemic", "anemia"), ("asthmatic", "asthma"),
        ("feverish febrile", "fever"), ("nauseous nauseated", "nausea"),
    ]
    for spelling in spellings.split()
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "left": "right", "right": "left", "man": "woman", "woman": "man",
    "increase": "decrease", "decrease": "increase", "upper": "lower", "lower": "upper",
    "former": "current", "current": "former",
}  # fmt: skip

NEGATIONS = frozenset(
    "no not denies denied deny denying without never nil none neither nor negative non".split()
)
# words after which a negation no longer holds
NEGATION_ENDS = frozenset(
    "but however except although though has have had reports reported complains presents with "
    "takes taking is was are were".split()
)

# words that carry no fact of their own: function words and the frame of a clinical sentence
EMPTY_WORDS = frozenset(
    """
    a an the of in on at to for from by as and or but with without into over under between per than
    then that this these those there here it its he she they his her him hers their them i we you
    who which what when where while also other any some all each both such so very more most less
    is was were be been being am are has have had having do does did will would should may might
    can could not no nor neither none never nil denies denied deny denying negative non if after
    before during since until again up down out about due because ago x s t
    patient pt history hx past medical presents presented presenting present presentation report
    reports reported state states stated note notes noted complain complains complaining complaint
    take takes taking taken took currently current today recent recently known old year years
    yo y m f mr mrs ms dr doctor include includes including reveal reveals show shows showed follow
    followed following given use uses used status associated related consistent significant
    including otherwise well mg mcg g ml day days week weeks month months hour hours time times
    daily once level exam examination evaluation evaluate symptom symptoms condition
    """.split()
)
