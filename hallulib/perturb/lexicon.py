"""Words of general clinical English by kind; names of one thing are joined by |."""

from __future__ import annotations

import re

ENTITIES: dict[str, list[str]] = {
    "drug": """
        acetaminophen|paracetamol|tylenol, albuterol|salbutamol, allopurinol, amiodarone,
        amlodipine, amoxicillin, apixaban|eliquis, aspirin, atenolol, atorvastatin|lipitor,
        azithromycin, bisoprolol, carvedilol, ceftriaxone, cephalexin|keflex, ciprofloxacin|cipro,
        citalopram, clopidogrel|plavix, codeine, colchicine, diazepam|valium, digoxin, diltiazem,
        doxycycline, enalapril, fluoxetine|prozac, furosemide|lasix, gabapentin|neurontin,
        glipizide, hydrochlorothiazide|hctz, hydrocodone, ibuprofen|motrin|advil, insulin,
        lamotrigine, levetiracetam|keppra, levofloxacin|levaquin, levothyroxine|synthroid,
        lisinopril, lorazepam|ativan, losartan, metformin|glucophage, methotrexate, metoprolol,
        montelukast, morphine, naproxen|aleve, nifedipine, nitroglycerin, omeprazole|prilosec,
        ondansetron|zofran, oxycodone, pantoprazole|protonix, penicillin, phenytoin|dilantin,
        prednisone, propranolol, ramipril, ranitidine|zantac, rosuvastatin|crestor,
        sertraline|zoloft, simvastatin|zocor, spironolactone, tamsulosin|flomax, tramadol,
        trazodone, valsartan, vancomycin, verapamil, warfarin|coumadin, zolpidem|ambien
    """,
    "condition": """
        anemia, asthma, atrial fibrillation|afib, breast cancer, bronchitis, cellulitis,
        cirrhosis, colon cancer, COPD|chronic obstructive pulmonary disease|emphysema,
        coronary artery disease|cad, Crohn's disease, deep vein thrombosis|dvt, dementia,
        depression, diabetes|diabetes mellitus|type 2 diabetes|type 1 diabetes|diabetic,
        diverticulitis, eczema, endometriosis, epilepsy|seizure disorder, fibromyalgia,
        gallstones|cholelithiasis, gastritis, gastroesophageal reflux disease|gerd|acid reflux,
        glaucoma, gout, heart failure|congestive heart failure|chf, hepatitis,
        hyperlipidemia|high cholesterol|hypercholesterolemia|dyslipidemia,
        hypertension|high blood pressure|htn, hyperthyroidism, hypothyroidism,
        kidney stones|nephrolithiasis, chronic kidney disease|renal failure|renal insufficiency,
        lupus, migraine|migraines, multiple sclerosis, myocardial infarction|heart attack,
        obstructive sleep apnea|sleep apnea, osteoarthritis, osteoporosis, pancreatitis,
        Parkinson's disease, pneumonia, polycystic kidney disease, prostate cancer, psoriasis,
        pulmonary embolism, rheumatoid arthritis, sciatica, scoliosis, sinusitis, stroke|cva,
        tuberculosis, ulcerative colitis, urinary tract infection|uti
    """,
    "symptom": """
        abdominal pain, back pain, blurred vision, chest pain, chills, constipation, cough,
        diarrhea, dizziness, ear pain, fatigue, fever|febrile, headache|headaches, hearing loss,
        heartburn, hematuria, hoarseness, insomnia, itching|pruritus, joint pain, leg swelling,
        loss of appetite, nausea, neck pain, night sweats, nosebleeds|epistaxis, numbness,
        palpitations, rash, runny nose, shortness of breath|dyspnea, sore throat,
        syncope|fainting, tingling, tremor, vomiting, weight gain, weight loss, wheezing
    """,
    "relative": "mother, father, brother, sister, grandmother, grandfather, aunt, uncle",
}
GROUPS: dict[str, list[tuple[str, ...]]] = {
    kind: [tuple(" ".join(name.split()) for name in entry.split("|")) for entry in text.split(",")]
    for kind, text in ENTITIES.items()
}
# any name of a kind, the longest first, so that "type 2 diabetes" is not read as "diabetes"
PATTERNS: dict[str, re.Pattern[str]] = {
    kind: re.compile(
        rf"\b(?:{'|'.join(sorted((re.escape(n) for g in groups for n in g), key=len)[::-1])})\b",
        re.IGNORECASE,
    )
    for kind, groups in GROUPS.items()
}

# words after which one more entity fits, as in "history of gout", "Takes aspirin", "denies fever"
BEFORE_A_LIST = frozenset("""
    of with and or for has had have takes taking took on by from including denies denied reports
    reported no without to
""".split())
# what an invented finding may be, by the kind of entity it is about
INVENTIONS: list[tuple[str, str]] = [
    ("symptom", "Also reports {}."), ("symptom", "Complains of {}."), ("drug", "Takes {}."),
    ("condition", "History of {}."), ("drug", "Allergic to {}."),
]  # fmt: skip

UNIT_SWAPS: dict[str, str] = {
    "mg": "mcg", "mcg": "mg", "µg": "mg", "g": "mg", "ml": "L", "mL": "L", "L": "mL",
    "cm": "mm", "mm": "cm", "kg": "lb", "pounds": "kg", "lb": "kg", "mg/dL": "g/dL",
    "g/dL": "mg/dL", "mg/L": "g/L", "mmol/L": "mol/L", "inches": "cm",
    "minute": "hour", "minutes": "hours", "hour": "day", "hours": "days", "day": "week",
    "days": "weeks", "week": "month", "weeks": "months", "month": "year", "months": "years",
    "year": "month", "years": "months",
}  # fmt: skip
DOSE_UNITS = ("mg", "mcg", "µg", "g", "ml", "mL", "units", "unit", "puffs", "tablets", "capsules")

SEXES: dict[str, str] = {
    "man": "woman", "woman": "man", "male": "female", "female": "male", "boy": "girl",
    "girl": "boy", "gentleman": "lady", "lady": "gentleman",
}  # fmt: skip

# a side is meant only where a part of the body follows ("left the hospital" names none)
BODY_PARTS = frozenset("""
    abdomen abdominal adrenal ankle ankles arm arms axilla breast buttock calf carotid cheek chest
    clavicle ear ears elbow extremity eye eyes facial femoral femur flank foot forearm frontal groin
    hand heel hemisphere hip hydronephrosis iliac inguinal jaw kidney knee leg limb lobe lung neck
    nipple occipital ovary parietal pelvic pleural popliteal renal rib rotator sciatic shoulder side
    sided temporal testicle thigh thumb thyroid toe tonsil ureter ureteric ventricle ventricular
    wrist
""".split())
SIDE_ADJECTIVES = frozenset("""
    upper lower middle mid inner outer lateral medial anterior posterior distal proximal small large
    great big little index
""".split())

# one flip of polarity each, in both directions; the second member replaces the first
NEGATIONS: list[tuple[str, str]] = [
    ("denies", "reports"), ("denied", "reported"), ("denying", "reporting"),
    ("reports", "denies"), ("reported", "denied"), ("complains of", "denies"),
    ("complained of", "denied"), ("admits to", "denies"), ("without", "with"),
    ("negative for", "positive for"), ("positive for", "negative for"),
    ("negative", "positive"), ("positive", "negative"), ("never smoked", "currently smokes"),
    ("never smoker", "current smoker"), ("former smoker", "never smoker"),
    ("current smoker", "never smoker"), ("nonsmoker", "smoker"), ("absent", "present"),
    ("none known", "several known"), ("no known", "known"), ("no history of", "a history of"),
    ("a history of", "no history of"), ("has no", "has"), ("had no", "had"),
    ("there is no", "there is"), ("there was no", "there was"), ("is not", "is"),
    ("was not", "was"), ("are not", "are"), ("were not", "were"), ("does not have", "does have"),
    ("unremarkable", "abnormal"), ("normal", "abnormal"), ("abnormal", "normal"),
    ("stable", "unstable"), ("is taking", "is not taking"), ("has had", "has not had"),
]  # fmt: skip
