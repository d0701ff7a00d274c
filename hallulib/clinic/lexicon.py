"""The words of the clinic world: every value a fact can take.

No value contains ", " or " and ", so that a list of values reads naturally and can be taken apart
again exactly. Values are lower case where they may stand in the middle of a sentence.
"""

from __future__ import annotations

COMPLAINTS = [
    "chest tightness", "shortness of breath", "lower back pain", "abdominal pain",
    "recurrent headaches", "a persistent cough", "swelling of the ankles", "palpitations",
    "pain in the left knee", "pain in the right shoulder", "dizziness on standing",
    "blurred vision", "burning on urination", "difficulty swallowing", "unintended weight loss",
    "numbness of the right hand", "numbness of the left foot", "a productive cough",
    "increasing fatigue", "a painful calf", "hoarseness", "heartburn",
]  # fmt: skip
DURATIONS = [
    "two days", "three days", "four days", "five days", "ten days", "one week", "two weeks",
    "three weeks", "six weeks", "two months", "three months", "six months", "one year",
]  # fmt: skip
CONDITIONS = [
    "type 2 diabetes", "hypertension", "asthma", "gout", "atrial fibrillation", "hypothyroidism",
    "chronic kidney disease", "coronary artery disease", "COPD", "osteoarthritis", "migraine",
    "epilepsy", "depression", "heart failure", "psoriasis", "Crohn's disease", "osteoporosis",
    "hyperlipidemia", "obstructive sleep apnea", "rheumatoid arthritis", "iron deficiency anemia",
    "gallstones", "diverticulosis", "glaucoma", "kidney stones",
]  # fmt: skip
# drug -> (doses, how often); the doses are those a pharmacist would expect
DRUGS: dict[str, tuple[list[str], list[str]]] = {
    "metformin": (["500 mg", "850 mg", "1000 mg"], ["once daily", "twice daily"]),
    "lisinopril": (["5 mg", "10 mg", "20 mg"], ["once daily"]),
    "amlodipine": (["5 mg", "10 mg"], ["once daily"]),
    "atorvastatin": (["20 mg", "40 mg", "80 mg"], ["at night"]),
    "levothyroxine": (["50 mcg", "75 mcg", "100 mcg"], ["every morning"]),
    "allopurinol": (["100 mg", "300 mg"], ["once daily"]),
    "apixaban": (["2.5 mg", "5 mg"], ["twice daily"]),
    "bisoprolol": (["2.5 mg", "5 mg", "10 mg"], ["once daily"]),
    "omeprazole": (["20 mg", "40 mg"], ["every morning", "twice daily"]),
    "sertraline": (["50 mg", "100 mg"], ["once daily"]),
    "furosemide": (["20 mg", "40 mg", "80 mg"], ["every morning", "twice daily"]),
    "gabapentin": (["100 mg", "300 mg"], ["three times daily", "at night"]),
    "montelukast": (["10 mg"], ["at night"]),
    "methotrexate": (["10 mg", "15 mg"], ["once weekly"]),
    "ramipril": (["2.5 mg", "5 mg", "10 mg"], ["once daily"]),
    "losartan": (["50 mg", "100 mg"], ["once daily"]),
    "simvastatin": (["20 mg", "40 mg"], ["at night"]),
    "lamotrigine": (["50 mg", "100 mg"], ["twice daily"]),
    "spironolactone": (["25 mg", "50 mg"], ["once daily"]),
    "tamsulosin": (["0.4 mg"], ["at night"]),
}
ALLERGIES = [
    "penicillin (rash)", "penicillin (anaphylaxis)", "sulfonamides (hives)", "latex (rash)",
    "codeine (nausea)", "aspirin (wheezing)", "iodinated contrast (hives)", "ibuprofen (swelling)",
    "erythromycin (vomiting)", "cephalosporins (rash)", "none known",
]  # fmt: skip
NEGATIVES = [
    "fever", "chills", "night sweats", "vomiting", "diarrhea", "blood in the stool", "syncope",
    "leg swelling", "chest pain", "recent travel", "head injury", "loss of appetite", "rash",
    "urinary symptoms", "visual loss",
]  # fmt: skip
# {side} is drawn as left or right
IMAGING = [
    "chest X-ray with {side} lower lobe consolidation", "chest X-ray with a small {side} effusion",
    "ultrasound with {side} hydronephrosis", "ultrasound with a {side} renal cyst",
    "Doppler with {side} popliteal vein thrombosis", "MRI with a {side} parietal lesion",
    "CT with a {side} adrenal nodule", "CT with a {side} upper lobe nodule",
    "X-ray with {side} hip joint narrowing", "MRI with a {side} rotator cuff tear",
    "CT with a {side} ureteric stone", "X-ray with a {side} rib fracture",
]  # fmt: skip
LABS: dict[str, tuple[float, float, int, str]] = {  # name -> (low, high, decimals, unit)
    "creatinine": (0.6, 2.4, 1, "mg/dL"),
    "hemoglobin": (8.0, 16.5, 1, "g/dL"),
    "potassium": (3.1, 5.6, 1, "mmol/L"),
    "CRP": (3, 160, 0, "mg/L"),
    "HbA1c": (5.2, 10.4, 1, "percent"),
}
RELATIVES = ["father", "mother", "brother", "sister", "grandmother", "uncle"]
FAMILY_ILLNESSES = [
    "stroke", "colon cancer", "breast cancer", "myocardial infarction", "type 1 diabetes",
    "dementia", "aortic aneurysm", "multiple sclerosis", "polycystic kidney disease",
]  # fmt: skip
SMOKING = [
    "never smoked", "former smoker", "current smoker", "10 pack-years", "20 pack-years",
    "30 pack-years", "40 pack-years",
]  # fmt: skip
PLANS = [
    "start amoxicillin", "start prednisone", "start doxycycline", "refer to cardiology",
    "refer to physiotherapy", "refer to neurology", "refer to urology", "order an echocardiogram",
    "order a colonoscopy", "order an MRI", "repeat the blood tests", "admit for observation",
    "increase the diuretic", "begin anticoagulation", "schedule spirometry", "advise bed rest",
]  # fmt: skip
FOLLOW_UPS = [
    "in three days", "in one week", "in two weeks", "in four weeks", "in six weeks",
    "in three months", "in six months", "by telephone", "as needed",
]  # fmt: skip
REASONS_STOPPED = ["cough", "dizziness", "muscle pain", "stomach upset", "low sodium"]
